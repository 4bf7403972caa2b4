"""vLLM plugin: `vllm serve MODEL --quantization rowint8`.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in the API server, the engine
core and every worker process.
"""


def register() -> None:
    """Adds `rowint8` to the methods that vLLM knows, and guards the models that use it. Again, it changes nothing."""
    import vllm
    from vllm.model_executor.layers.quantization import register_quantization_config

    from rowint8.vllm_plugin.compat import note_version
    from rowint8.vllm_plugin.config import RowInt8Config
    from rowint8.vllm_plugin.hooks import install

    note_version(vllm.__version__)
    register_quantization_config("rowint8")(RowInt8Config)
    install()
