"""vLLM plugin: `vllm serve MODEL --quantization rowint8`.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in the API server, the engine
core and every worker process.
"""


def register() -> None:
    """Adds `rowint8` to the methods and norms that vLLM knows, and guards its models. Again, it changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from rowint8.vllm_plugin.config import RowInt8Config
    from rowint8.vllm_plugin.hooks import install
    from rowint8.vllm_plugin.norm import register_provider

    register_quantization_config("rowint8")(RowInt8Config)
    register_provider()
    install()
