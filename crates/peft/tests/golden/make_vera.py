"""Makes `vera`: VeRA of PEFT 0.21.2, torch 2.15.0, on a CPU, over two layers.

python make_vera.py
"""

import pathlib

import torch
from peft import VeraConfig, get_peft_model
from safetensors.torch import save_file

out = pathlib.Path(__file__).parent / "vera"
torch.set_num_threads(1)
torch.manual_seed(21)


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(12, 20, bias=True)
        self.down = torch.nn.Linear(20, 8, bias=False)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x)))


base = Mlp()
tensors = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
x = torch.randn(5, 12)
tensors["x"] = x
with torch.no_grad():
    tensors["base_y"] = base(x)
config = VeraConfig(r=6, projection_prng_key=3, vera_dropout=0.25, target_modules=["up", "down"])
model = get_peft_model(base, config)
for name, parameter in model.named_parameters():
    if "vera_lambda" in name:
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
model.save_pretrained(out)
(out / "README.md").unlink()
model.eval()
y = model(x)
y.square().sum().backward()
tensors["y"] = y.detach()
for name, parameter in model.named_parameters():
    if "vera_lambda" in name:
        tensors["grad." + name.replace(".default", "")] = parameter.grad.clone()
merged = model.merge_and_unload()
with torch.no_grad():
    tensors["merged_y"] = merged(x)
tensors["merged.up.weight"] = merged.up.weight.detach()
tensors["merged.down.weight"] = merged.down.weight.detach()
tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
save_file(tensors, out / "reference.safetensors", {"format": "pt"})
