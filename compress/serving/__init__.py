"""How other engines run what we write. vLLM finds `vllm_plugin.register` by its entry point; nothing else needs vLLM."""
