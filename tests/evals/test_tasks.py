"""lm-eval tasks from local files: the right documents, the right strings, the right score, and good errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qtoolkit.errors import DataError, RequestError
from qtoolkit.evals import task_files, tasks

ROWS = {
    "piqa": [{"query": "Question: a\nAnswer:", "choices": ["bb", "c"], "gold": g} for g in (0, 1, 0, 1)],
    "arc_challenge": [{"query": "Question: a\nAnswer:", "choices": list("bcde"), "gold": 3}],
    "winogrande": [
        {"context_options": ["He saw Ann", "He saw Bob"], "continuation": "and left.", "gold": 1},
        {"context_options": ["It was Ann", "It was Bob"], "continuation": "'s.", "gold": 0},
    ],
    "lambada_openai": [{"context": "the cat sat on the", "continuation": "mat"}],
}


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return tmp_path


def requests(name: str, folder: Path) -> list[tuple[str, str]]:
    """Return what lm-eval will ask the model about the first document: (context, continuation)."""
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load([task_files.definition(name, folder / f"{name}.jsonl")])
    task = loaded["tasks"][name]
    found = []
    for document in task.test_docs():
        context = task.fewshot_context(document, 0)
        made = task.construct_requests(document, context)
        found += [each.arguments for each in (made if isinstance(made, list) else [made])]
    return found


def test_four_tasks_have_definitions() -> None:
    assert task_files.names() == sorted(ROWS)


def test_choices_follow_the_question_after_one_space(task_dir: Path) -> None:
    assert requests("piqa", task_dir)[:2] == [("Question: a\nAnswer:", " bb"), ("Question: a\nAnswer:", " c")]
    assert [answer for _, answer in requests("arc_challenge", task_dir)] == [" b", " c", " d", " e"]


def test_winogrande_compares_the_same_end_after_both_beginnings(task_dir: Path) -> None:
    assert requests("winogrande", task_dir) == [
        ("He saw Ann", " and left."),
        ("He saw Bob", " and left."),
        ("It was Ann", "'s."),  # no space before punctuation
        ("It was Bob", "'s."),
    ]


def test_lambada_asks_for_the_last_word(task_dir: Path) -> None:
    assert requests("lambada_openai", task_dir) == [("the cat sat on the", " mat")]


def test_scores_are_those_of_summed_log_probabilities(model: Any, tokenizer: Any, task_dir: Path) -> None:
    import torch

    def logp(context: str, answer: str) -> float:
        ids = tokenizer(context + answer)["input_ids"]
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(rows[i - 1, ids[i]].item() for i in range(start, len(ids)))

    found = tasks.on_model(tasks.plan(["piqa"], task_dir), model, tokenizer, limit=3, batch_size=2)["piqa"]
    best = int(logp("Question: a\nAnswer:", " c") > logp("Question: a\nAnswer:", " bb"))
    expected = [float(row["gold"] == best) for row in ROWS["piqa"][:3]]
    assert found.each == expected
    assert found.value == pytest.approx(sum(expected) / 3)
    assert (found.documents, found.available, found.chance, found.primary) == (3, 4, 0.5, "acc")
    assert set(found.metrics) == {"acc", "acc_norm"}


def test_all_four_run_offline_and_print_nothing(
    model: Any, tokenizer: Any, task_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tasks.on_model(tasks.plan(sorted(ROWS), task_dir), model, tokenizer, limit=None, batch_size=4)
    assert sorted(found) == sorted(ROWS)
    assert found["lambada_openai"].metrics["perplexity"] > 1
    assert capsys.readouterr().out == ""  # stdout belongs to the command's result


def test_real_task_files_fit_the_definitions(shared_data: Path) -> None:
    sizes = {"arc_challenge": 1172, "lambada_openai": 2000, "piqa": 1838, "winogrande": 1267}
    found = {name: task_files.definition(name, shared_data / "tasks" / f"{name}.jsonl") for name in sizes}
    assert {name: len(task["custom_dataset"]()["test"]) for name, task in found.items()} == sizes


def test_unknown_task_names_the_nearest(task_dir: Path) -> None:
    with pytest.raises(RequestError, match="winogrand") as raised:
        tasks.plan(["winogrand"], task_dir)
    assert "winogrande" in raised.value.hint


def test_own_yaml_in_the_task_folder_is_found(task_dir: Path, model: Any, tokenizer: Any) -> None:
    rows = task_dir / "mine-rows.jsonl"
    rows.write_text('{"q": "one plus one is", "a": ["two", "three"]}\n', "utf-8")
    (task_dir / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {task_dir / 'cache'}}}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{a}}"\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n',
        "utf-8",
    )
    plan = tasks.plan(["mine", "piqa"], task_dir)
    found = tasks.on_model(plan, model, tokenizer, limit=None, batch_size=2)
    assert found["mine"].value in (0, 1)
    assert found["piqa"].documents == 4


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtoolkit.evals.extras.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="lm_eval, tenacity, aiohttp, which are not installed") as raised:
        tasks.plan(["piqa"], over_http=True)
    assert "qtoolkit[eval]" in raised.value.hint


def test_missing_task_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no task folder"):
        tasks.plan(["piqa"], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "said"),
    [("", "empty"), ("not json\n", "line 1: not JSON"), ('{"query": "a"}\n', "line 1: no field choices, gold")],
)
def test_damaged_task_file_is_named_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "piqa.jsonl").write_text(content, "utf-8")
    with pytest.raises(DataError, match=said):
        tasks.plan(["piqa"], tmp_path)


def test_only_one_file_imports_lm_eval() -> None:
    folder = Path(tasks.__file__).parent
    found = [path.name for path in folder.rglob("*.py") if "lm_eval" in _imports(path)]
    assert found == ["tasks.py"]


def _imports(path: Path) -> set[str]:
    import ast

    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found
