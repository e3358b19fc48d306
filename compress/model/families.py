"""The families whose tiny models our tests compress, save, reload and compare, by transformers' model types.

`python -m paredown.compress.model.families` prints the list as the README has it.
"""

from textwrap import fill

_NAMES = """
afmoe apertus arcee aria aria_text axk1 axk2 aya_vision bailing_hybrid bamba bart beam bert bert-generation
big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom blt camembert codegen cohere cohere2
cohere2_moe cohere2_vision cohere_compass cohere_compass_text cosmos3_omni cpmant ctrl cwm data2vec-text dbrx
deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 deepseek_vl deepseek_vl_hybrid diffllama doge dots1 dots3_note
dots3_note_text electra emu3 ernie ernie4_5 ernie4_5_moe exaone4 exaone4_5 exaone_moe falcon falcon_h1
falcon_mamba flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified
gemma4_unified_text git glm glm4 glm46v glm4_moe glm4_moe_lite glm4v glm4v_moe glm_moe_dsa glm_ocr glmasr glmga
got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_docling
granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe
hy_v3 hy_v4 hyperclovax hyperclovax_vision_v2 idefics2 idefics3 inkling_mm_model inkling_text internlm3 internvl
iquestcoder jais2 jamba jetmoe kimi_k25 kimi_linear kolibri1 kosmos-2.5 laguna lfm2 lfm2_moe lfm2_vl lfm3
lfm3_vl lighton_ocr llama llama4 llama4_text llava llava_next llava_next_video llava_onevision longcat_flash
mamba mamba2 marian mbart megatron-bert mellum mimo_v2_flash minicpm3 minicpm_ocr minicpmv4_6 minicpmv4_7
minimax minimax_m2 minimax_m3_vl minimax_m3_vl_text ministral ministral3 mistral mistral3 mistral4
mistral_large4 mixtral mllama modernbert-decoder moshi moss_transcribe_diarize mpt mvp nanochat nemotron
nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt ovis2 paddleocr_vl paligemma pegasus persimmon phi
phi3 phi4_multimodal phimoe plbart pp_chart2table prophetnet qianfan_ocr qwen2 qwen2_5_omni_thinker qwen2_5_vl
qwen2_audio qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_asr qwen3_moe
qwen3_next qwen3_omni_moe_thinker qwen3_vl qwen3_vl_moe qwen4_exp qwen4_exp_text recurrent_gemma rembert roberta
roberta-prelayernorm roc_bert roformer rwkv seed_oss smollm3 smolvlm solar_open stablelm starcoder2 step3p7
trocr unlimited_ocr vaultgemma video_llama_3 video_llava vipllava voxtral whisper xglm xlm-roberta
xlm-roberta-xl youtu zamba zamba2 zaya
"""
FAMILIES = frozenset(_NAMES.split())


def listed() -> str:
    """All families as Markdown, in lines of at most 120 characters."""
    return fill(", ".join(f"`{family}`" for family in sorted(FAMILIES)), 120, break_on_hyphens=False)


if __name__ == "__main__":
    print(listed())
