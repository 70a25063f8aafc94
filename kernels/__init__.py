"""W4A8 operators: definition, exact reference, and the backends that run them on CPUs and GPUs."""

if __name__ == "kernels":  # Hugging Face's package of that name, which transformers imports, must not be shadowed
    raise ImportError("this folder is the subpackage qtoolkit.kernels; run from outside the repository root")
