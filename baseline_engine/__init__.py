"""A small engine that a student can read in an evening. It runs Llama models, in bf16 or over the INT8 operators.

Read it in this order; a request passes through the files the same way:

    cli         the command `baseline-generate`: flags in, streamed text and a table of metrics out
    engine      `Engine.generate`, and `Engine.step`, which is the whole story: run the model, sample, record
    request     one prompt on its way to becoming a completion
    tokenizer   text to token ids and back, piece by piece
    model       the decoder: embedding, layers, norm, logits
    layers      linear layers (plain and INT8), attention, SwiGLU, rotary positions
    kv_cache    the keys and values of the tokens seen so far
    sampler     logits to the next token
    metrics     what TTFT, ITL, TPOT, tok/s and the rest mean, defined once
    config      what a config.json says, checked
    checkpoint  safetensors into the model, quantized on the way
"""
