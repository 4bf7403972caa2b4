"""A small engine that a student can read in an evening: paged, continuously batching, in bf16 or over INT8 operators.

Read it in this order; a request passes through the files the same way (docs/engine.md walks one through):

    cli           the command `baseline-generate`: flags in, streamed text and a table of metrics out
    engine        `Engine.generate`, and `Engine.step`, which is the whole story: schedule, launch, record
    async_engine  the same for coroutines: `async for event in engine.stream(prompt)`
    request       one prompt on its way to becoming a completion
    tokenizer     text to token ids and back, piece by piece; stop strings
    scheduler     which tokens of which requests are computed next
    block_pool    which blocks of the KV cache are free, whose they are, and what can be shared
    runner        a step's tokens into tensors, through the model or a CUDA graph, to sampled tokens
    model         the decoder: embedding, layers, norm, logits
    layers        linear layers (plain and INT8), norms, rotary positions, SwiGLU
    attention     which library computes attention over the paged cache, and how it is asked
    kv_cache      the memory behind the blocks
    sampler       logits to the next token
    scoring       how likely the model finds a given text: the same steps, nothing sampled
    metrics       what TTFT, ITL, TPOT, tok/s and the rest mean, defined once

and, once at the start:

    startup       load, choose, measure memory, compile, capture
    config        what the user asks for, checked
    model_config  what a config.json says, checked
    checkpoint    safetensors into the model, quantized on the way; and back

Besides: errors, progress (a bar) and transfer (lists to the device).
"""
