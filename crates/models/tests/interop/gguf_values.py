"""The values of all tensors of a GGUF file in the order of their names, read by the package `gguf`:
`gguf_values.py MODEL.gguf OUT`."""
import sys

import gguf
import numpy as np

path, out = sys.argv[1:3]
with open(out, "wb") as file:
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.name):
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        file.write(np.ascontiguousarray(values, dtype=np.float32).tobytes())
