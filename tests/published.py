"""The published loop, transcribed plainly from its description: what the fast path is measured against on a CPU.

Nothing is hoisted, folded or batched: keys and values are projected at every tick, the trace is copied, weights are
kept in the published layouts. Works on a published state dict. `python tests/published.py` prints how much faster a
training step of this project is, both in the same run.
"""

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctm import compat
from ctm.loss import route_loss


class Published(nn.Module):
    """A published image model (`ctm` kind, ResNet).

    Args:
        config: the published constructor's arguments. state: the published state dict.
        features: the backbone and position embedding, images -> (B, C, H, W).
    """

    def __init__(self, config: dict, state: dict[str, Tensor], features: nn.Module):
        super().__init__()
        self.config, self.features = config, features
        self.names = {name: name.replace(".", "_") for name in state}
        for name, value in state.items():
            if name.startswith(("backbone.", "initial_rgb.", "positional_embedding.")):
                continue
            if value.is_floating_point():
                self.register_parameter(self.names[name], nn.Parameter(value.clone()))
            else:
                self.register_buffer(self.names[name], value.clone())

    def get(self, name: str) -> Tensor:
        return getattr(self, self.names[name])

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config["dropout"], self.training)

    def synapses(self, x: Tensor) -> Tensor:
        depth = self.config["synapse_depth"]
        if depth == 1:
            return self.norm(F.glu(self.linear(self.dropout(x), "synapses.1")), "synapses.3")
        first = "synapses.first_projection"
        outs = [F.silu(self.norm(self.linear(x, f"{first}.0"), f"{first}.1"))]
        for i in range(depth - 1):
            name = f"synapses.down_projections.{i}"
            outs.append(F.silu(self.norm(self.linear(self.dropout(outs[-1]), f"{name}.1"), f"{name}.2")))
        u = outs[-1]
        for i in range(depth - 2, -1, -1):
            name = f"synapses.up_projections.{i}"
            u = F.silu(self.norm(self.linear(self.dropout(u), f"{name}.1"), f"{name}.2"))
            u = self.norm(u + outs[i], f"synapses.skip_lns.{i}")
        return u

    def super_linear(self, x: Tensor, name: str) -> Tensor:
        x = self.dropout(x)
        if self.config["do_layernorm_nlm"]:
            x = self.norm(x, f"{name}.layernorm")
        y = torch.einsum("bdm,mhd->bdh", x, self.get(f"{name}.w1")) + self.get(f"{name}.b1")
        return y / self.get(f"{name}.T")

    def neurons(self, trace: Tensor) -> Tensor:
        x = F.glu(self.super_linear(trace, "trace_processor.0.0"))
        if self.config["deep_nlms"]:
            x = F.glu(self.super_linear(x, "trace_processor.0.2"))
        return x.squeeze(-1)

    def pairs(self, z: Tensor, side: str) -> Tensor:
        left, right = (self.get(f"{side}_neuron_indices_{hand}") for hand in ("left", "right"))
        if self.config["neuron_select_type"] == "random-pairing":
            return z[:, left] * z[:, right]
        outer = z[:, left].unsqueeze(2) * z[:, right].unsqueeze(1)
        i, j = torch.triu_indices(len(left), len(right))
        return outer[:, i, j]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions (B, C, T) and certainties (B, T)."""
        c, batch = self.config, len(images)
        kv = self.norm(self.linear(self.features(images).flatten(2).transpose(1, 2), "kv_proj.0"), "kv_proj.1")
        trace = self.get("start_trace").expand(batch, -1, -1)
        z = self.get("start_activated_state").expand(batch, -1)
        r_action, r_out = (
            torch.exp(-self.get(f"decay_params_{side}").clamp(0, 15)).expand(batch, -1) for side in ("action", "out")
        )
        alpha_action = beta_action = None
        alpha_out = self.pairs(z, "out")
        beta_out = torch.ones_like(alpha_out)
        classes = c["prediction_reshaper"][-1]
        predictions, certainties = [], []
        for _ in range(c["iterations"]):
            pair = self.pairs(z, "action")
            alpha_action = pair if alpha_action is None else r_action * alpha_action + pair
            beta_action = torch.ones_like(pair) if beta_action is None else r_action * beta_action + 1
            query = self.linear(alpha_action / torch.sqrt(beta_action), "q_proj").unsqueeze(1).transpose(0, 1)
            read, _ = F.multi_head_attention_forward(
                query, kv.transpose(0, 1), kv.transpose(0, 1), c["d_input"], c["heads"],
                self.get("attention.in_proj_weight"), self.get("attention.in_proj_bias"), None, None, False,
                c["dropout"], self.get("attention.out_proj.weight"), self.get("attention.out_proj.bias"), self.training,
                need_weights=True, average_attn_weights=False,
            )  # fmt: skip
            pre = self.synapses(torch.cat([read[0], z], dim=-1))
            trace = torch.cat([trace[:, :, 1:], pre.unsqueeze(-1)], dim=-1)
            z = self.neurons(trace)
            alpha_out = r_out * alpha_out + self.pairs(z, "out")
            beta_out = r_out * beta_out + 1
            y = self.linear(alpha_out / torch.sqrt(beta_out), "output_projector.0")
            logits = y.reshape(batch, -1, classes) if classes > 0 else y.unsqueeze(1)
            entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1) / math.log(logits.shape[-1])
            predictions.append(y)
            certainties.append(1 - entropy.mean(-1))
        return torch.stack(predictions, dim=-1), torch.stack(certainties, dim=-1)


def from_case(kind: str, config: dict, state: dict[str, Tensor]) -> Published:
    """With the backbone of our model, which is torchvision's, and its position embedding."""
    encoder = compat.load(kind, config, state).encoder

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, images: Tensor) -> Tensor:
            x = self.encoder.features(images)
            return x if self.encoder.position is None else x + self.encoder.position(x)

    return Published(config, state, Features())


ABLATION = {
    "iterations": 50, "d_model": 1024, "d_input": 256, "heads": 4, "n_synch_out": 1024, "n_synch_action": 1024,
    "synapse_depth": 8, "memory_length": 25, "deep_nlms": True, "memory_hidden_dims": 32, "do_layernorm_nlm": False,
    "dropout": 0.1, "backbone_type": "resnet18-1", "positional_embedding_type": "none", "out_dims": 250,
    "prediction_reshaper": [50, 5], "neuron_select_type": "random-pairing",
}  # fmt: skip


def main(batch: int = 16, rounds: int = 5) -> None:
    """The 15x15 ablation step (forward, loss, backward, AdamW), the two by turns; medians and their ratio."""
    torch.manual_seed(0)
    ours = compat.build("ctm", ABLATION).train()
    theirs = from_case("ctm", ABLATION, compat.export(ours)).train()
    images, routes = torch.rand(batch, 3, 15, 15), torch.randint(5, (batch, 50))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in (ours, theirs)]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        start = time.perf_counter()
        out = model(images)
        predictions, certainty = (out[0].mT, out[1]) if model is theirs else (out.predictions, out.certainty)
        optimizer.zero_grad()
        route_loss(predictions, certainty, routes).backward()
        optimizer.step()
        return time.perf_counter() - start

    times = np.array([[step(model, opt) for model, opt in zip((ours, theirs), optimizers, strict=True)]
                      for _ in range(rounds + 1)])[1:]  # fmt: skip
    mine, published = np.median(times, axis=0)
    rounds = ", ".join(f"{b / a:.1f}" for a, b in times)
    print(
        f"15x15 step, batch {batch}, {torch.get_num_threads()} threads: {mine:.2f} s, published loop {published:.2f} s"
    )
    print(f"{published / mine:.1f} times faster (by rounds: {rounds})")


if __name__ == "__main__":
    main()
