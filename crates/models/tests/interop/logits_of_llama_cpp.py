"""The logits of llama.cpp for windows of tokens: `logits_of_llama_cpp.py MODEL.gguf TOKENS.json OUT`.

OUT gets the logits as floats of 32 bits, window by window.

TOKENS.json is a list of windows. Needs llama-cpp-python, or cyllama.
"""
import json, sys

import numpy as np


def of_llama_cpp_python(path, windows):
    from llama_cpp import Llama

    llama = Llama(path, n_ctx=len(windows[0]), n_batch=len(windows[0]), logits_all=True, verbose=False)
    for window in windows:
        llama.reset()
        llama.eval(window)
        yield np.array(llama.scores[: len(window)], dtype=np.float32)


def of_cyllama(path, windows):
    from cyllama.llama import llama_cpp as lc

    lc.disable_logging()
    lc.ggml_backend_load_all()
    model_params = lc.LlamaModelParams()
    model_params.n_gpu_layers = 0
    # Its bindings read the logits by an attribute that its class of models lacks.
    with_vocab = type("Model", (lc.LlamaModel,), {"n_vocab": property(lambda self: self.get_vocab().n_vocab)})
    model = with_vocab(path, model_params)
    n = len(windows[0])
    for window in windows:
        params = lc.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = n
        params.n_threads = params.n_threads_batch = 1
        context = lc.LlamaContext(model, params)
        batch = lc.LlamaBatch(n_tokens=n, embd=0, n_seq_max=1)
        batch.set_batch(window, 0, True)
        context.decode(batch)
        yield np.stack([np.array(context.get_logits_ith(at), dtype=np.float32) for at in range(n)])


path, tokens, out = sys.argv[1:4]
windows = json.load(open(tokens))
try:
    import llama_cpp as _

    logits = of_llama_cpp_python
except ImportError:
    logits = of_cyllama
found = np.stack(list(logits(path, windows)))
found.tofile(out)
targets = np.array(windows)[:, 1:]
before = found[:, :-1].astype(np.float64)
before -= before.max(-1, keepdims=True)
nll = np.log(np.exp(before).sum(-1)) - np.take_along_axis(before, targets[..., None], -1)[..., 0]
print(json.dumps({"perplexity": float(np.exp(nll.mean()))}))
