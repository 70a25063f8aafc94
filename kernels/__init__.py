"""W4A8 operators: definition, exact reference, and the backends that run them on CPUs and GPUs."""

if __name__ == "kernels":
    # The repository's root is on sys.path, and this folder hides Hugging Face's package of that name. transformers
    # asks for its version first, and counts version 0 as absent; whoever wants more is told what happened.
    __version__ = "0"

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"cannot import {name!r}: this folder is qtoolkit.kernels and hides the package 'kernels'; "
            "run from outside the repository's root"
        )
