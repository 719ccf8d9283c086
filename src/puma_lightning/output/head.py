"""The output layer without its logits: loss, gradient, statistics and draws from hidden states, in chunks.

At a vocabulary of 151,645 the logits of 32 x 512 positions take 10 GB, and a loss makes several such tensors. Here
the positions that count are taken some at a time. One buffer holds the logits of a chunk, becomes their softmax and
then the loss's gradient in them, from which two matrix products make the gradients of hidden states and weight at
once. Nothing of size (positions, vocabulary) outlives its chunk, and no product is computed twice.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from puma_lightning.output.drawing import draw_at
from puma_lightning.output.prediction import Prediction, Statistic, exclude_token_

# Logits of one chunk. A product with fewer than about 256 rows is slow, and the weight's gradient is read and written
# once per chunk. A GPU's products are so fast that the second matters more.
CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}
# Rows of the buffer start at multiples of this: with an odd vocabulary a product into packed rows takes 1.5 times as
# long on a CPU, and tensor cores want 16 bytes.
ALIGNMENT = 16


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    position_weights: Tensor,
    bias: Tensor | None = None,
    mask_id: int | None = None,
    statistics: Collection[Statistic] = (),
    chunk_rows: int | None = None,
) -> tuple[Tensor, Prediction]:
    """Compute a weighted sum of N positions' cross-entropies, ``sum_i w_i * -log softmax(W h_i + b)[target_i]``.

    The weights come in, rather than a loss per position going out, because the gradients are made along with the
    logits: those of weight and bias sum over positions, so what every position counts for must be known by then. A
    factor on the whole loss (accumulation, a GradScaler) need not. The weight's gradient, (V, D) in float32, is kept
    until the backward pass comes to it, which makes a second one. Under autocast the products take its dtype;
    softmax, loss, statistics and the sums of gradients are in float32, or in float64 for float64 inputs.

    Args:
        hidden: What the output layer reads, (N, D). N may be 0: the loss is then 0 and the gradients are zeros.
        weight: The weight of the output layer, tied or not, (V, D).
        target: The right tokens, (N,) int64.
        position_weights: What every position counts for (N,) float; constants.
        bias: The bias of the output layer, (V,).
        mask_id: A token of probability 0.
        statistics: What else to return of the predictions.
        chunk_rows: Positions at a time; by default what ``rows_per_chunk`` says. It changes rounding only.

    Returns:
        The loss, () float32, with a gradient in hidden, weight and bias; and ``nll`` with the statistics asked for.

    Raises:
        ValueError: If shapes don't match, or a statistic is unknown.
    """
    _check(hidden, weight, bias, statistics, {"target": target, "position_weights": position_weights})
    learning = any(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias))
    if not (learning and torch.is_grad_enabled()):
        prediction = predict(hidden, weight, bias, mask_id, target, statistics, chunk_rows=chunk_rows)
        assert prediction.nll is not None
        return (position_weights.to(prediction.nll.dtype) * prediction.nll).sum(), prediction
    loss, *parts = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, target, position_weights.detach(), mask_id, statistics, chunk_rows
    )
    return loss, Prediction(*parts)


@torch.no_grad()
def predict(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask_id: int | None = None,
    target: Tensor | None = None,
    statistics: Collection[Statistic] = (),
    temperature: float | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    chunk_rows: int | None = None,
) -> Prediction:
    """Compute statistics of, and draw from, the predictions at N positions, for evaluation and sampling.

    A draw inverts the distribution function at one uniform number per position, all taken from the generator at the
    start. So draws don't depend on the chunks, and noise of size (N, V) is not needed.

    Args:
        hidden: What the output layer reads, (N, D).
        weight: The weight of the output layer, (V, D).
        bias: The bias of the output layer, (V,).
        mask_id: A token of probability 0: never predicted, never drawn.
        target: Tokens to return the ``nll`` of (N,) int64.
        statistics: What to return of the predictions, at temperature 1 whatever the draws' is.
        temperature: Draw a token from softmax(logits / temperature); 0 takes the most likely one.
        top_p: Draw only from the smallest set of tokens with at least this probability.
        generator: Source of the draws, on the device of ``hidden``.
        chunk_rows: Positions at a time; by default what ``rows_per_chunk`` says.

    Returns:
        What was asked for.

    Raises:
        ValueError: If shapes don't match, or a statistic is unknown.
    """
    _check(hidden, weight, bias, statistics, {} if target is None else {"target": target})
    if temperature and chunk_rows is None:
        # Draws keep copies of a chunk, with top_p also its sorted values and their places.
        most = rows_per_chunk(len(hidden), len(weight), hidden.device)
        chunk_rows = max(1, most // (4 if top_p == 1 else 8))
    head = _Head(hidden, weight, bias, mask_id, chunk_rows, draws=bool(temperature))
    greedy = temperature == 0
    found = head.empty({*statistics, "token"} if greedy else statistics, nll=target is not None)
    drawn = hidden.new_empty(len(hidden) if temperature else 0, dtype=torch.long)
    uniform = torch.rand(len(drawn), dtype=head.exact, device=hidden.device, generator=generator)
    with head.no_autocast():
        for rows, logits in head.chunks():
            if temperature:
                drawn[rows] = draw_at(logits, uniform[rows], temperature, top_p)
            _summarise(head, logits, None if target is None else target[rows], found, rows)
    if greedy:
        return replace(found, drawn=found.token, token=found.token if "token" in statistics else None)
    return replace(found, drawn=drawn if temperature else None)


def predict_where(
    where: Tensor,
    states: Tensor,
    head: nn.Linear,
    mask_id: int,
    reads: Collection[Statistic],
    temperature: float,
    top_p: float,
    generator: torch.Generator | None,
    number: int | None = None,
) -> Prediction:
    """Say what a sampler needs of some positions, see ``predict``.

    Args:
        where: True where a position counts, (B, L) bool.
        states: Hidden states aligned with positions, (B, L, D).
        head: The output layer.
        mask_id: The mask token.
        reads: The statistics wanted.
        temperature: Of the drawn tokens; 0 takes the most likely one.
        top_p: Draw only from the smallest set of tokens with at least this probability.
        generator: Source of the draws, on the device of ``states``.
        number: How many positions count at most; so many are computed. Without it the host would wait for the device
            to learn how many there are.

    Returns:
        The statistics and ``drawn``, (B, L) each; they mean nothing at other positions.
    """
    index = true_positions(where, number)
    found = predict(
        states.flatten(0, 1)[index],
        head.weight,
        head.bias,
        mask_id,
        statistics=reads,
        temperature=temperature,
        top_p=top_p,
        generator=generator,
    )
    return spread(found, index, where.shape)


def true_positions(mask: Tensor, number: int | None = None) -> Tensor:
    """Return where a mask, (B, L) bool, is true, in the flattened mask and in order, (``number``,) int64.

    Without the number the host would wait for the device to learn it.
    """
    if number is None:
        return mask.flatten().nonzero().squeeze(1)
    return mask.flatten().argsort(descending=True, stable=True)[:number]


def spread(found: Prediction, index: Tensor, shape: torch.Size) -> Prediction:
    """Put what was found at some positions, (N,), at their places among all, (B, L); 0 at the others."""
    return found.map(lambda value: value.new_zeros(shape.numel()).index_copy(0, index, value).view(shape))


def rows_per_chunk(num_positions: int, vocab_size: int, device: torch.device) -> int:
    """Return positions in a chunk: as many as ``CHUNK_BYTES`` of float32 logits, in chunks of like size; 1 at least.

    Autocast adds a copy of half the size, entropy one of the full size.
    """
    most = max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * _padded(vocab_size)))
    chunks = max(1, -(-num_positions // most))
    return max(1, -(-num_positions // chunks))


def softmax_overwrites(device: torch.device) -> bool:
    """Tell whether a softmax may be written over its logits: on a CPU a row is read whole before any of it is."""
    return device.type == "cpu"


class _LinearCrossEntropy(torch.autograd.Function):
    """The weighted loss, whose gradients are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        position_weights: Tensor,
        mask_id: int | None,
        statistics: Collection[Statistic],
        chunk_rows: int | None,
    ) -> tuple[Tensor | None, ...]:
        head = _Head(hidden, weight, bias, mask_id, chunk_rows)
        found = head.empty(statistics, nll=True)
        position_weights = position_weights.to(head.exact)
        in_hidden, in_weight, in_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden, dtype=head.exact) if in_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=head.exact) if in_weight else None
        grad_bias = torch.zeros_like(bias, dtype=head.exact) if in_bias and bias is not None else None
        with head.no_autocast():
            for rows, logits in head.chunks():
                buffer, total = _summarise(head, logits, target[rows], found, rows)
                # The gradient of nll in the logits: softmax, less 1 at the target. The weights join smaller factors.
                index = target[rows, None]
                buffer.scatter_(1, index, buffer.gather(1, index) - total)
                weights = position_weights[rows, None] / total
                if grad_bias is not None:
                    grad_bias += (weights.t() @ buffer)[0, : head.vocab_size]
                if grad_hidden is None and grad_weight is None:
                    continue
                gradient = head.narrow(buffer)
                if grad_hidden is not None:
                    _multiply(gradient, head.backward_weight, out=grad_hidden[rows])
                    grad_hidden[rows] *= weights
                if grad_weight is not None:
                    weighted = (hidden[rows] * weights).to(gradient.dtype)
                    _add_product(grad_weight, gradient.t(), weighted)
        assert found.nll is not None
        loss = (position_weights * found.nll).sum()
        outputs = (found.nll, found.token, found.log_prob, found.margin, found.entropy)
        ctx.mark_non_differentiable(*(output for output in outputs if output is not None))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # Not in place: with retain_graph=True this runs again. Autograd casts to the dtypes of the inputs.
        gradients = [None if saved is None else saved * grad_loss for saved in ctx.saved_tensors]
        return *gradients, None, None, None, None, None


class _Head:
    """The output layer in the dtypes of its products, and the buffer that every chunk of logits is written to."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask_id: int | None,
        chunk_rows: int | None,
        draws: bool = False,
    ) -> None:
        device = hidden.device
        self.fused = softmax_overwrites(device)
        self.exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        # In float16 small factors of gradients would be 0 and large sums infinite; a scaler on the loss comes too late.
        self.backward_dtype = self.exact if dtype == torch.float16 else dtype
        self.hidden, self.weight, self.backward_weight = hidden, weight, weight.to(self.backward_dtype)
        self.bias = bias
        self.mask_id = mask_id
        self.vocab_size = len(weight)
        self.rows = chunk_rows or rows_per_chunk(len(hidden), self.vocab_size, device)
        self.buffer = self._buffer(self.exact)
        self.narrowed: Tensor | None = None
        # Sums and draws want all bits, and so do operators of a CPU, which would make copies.
        self.widens = self.fused or draws or bias is not None

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        rows = min(self.rows, len(self.hidden))
        return torch.empty(rows, _padded(self.vocab_size), dtype=dtype, device=self.hidden.device)

    def no_autocast(self) -> torch.autocast:
        """Turn autocast off: the dtypes are chosen already."""
        return torch.autocast(self.hidden.device.type, enabled=False)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows of each chunk, and its logits, (n, V and padding), which may be overwritten.

        They are in the buffer, or in the dtype of the product beside it.
        """
        for start in range(0, len(self.hidden), self.rows):
            rows = slice(start, min(start + self.rows, len(self.hidden)))
            size = rows.stop - start
            # Rows with padding: those of a new tensor would not be aligned.
            logits = self.buffer[:size] if self.hidden.dtype == self.exact else self._narrow(size)
            torch.mm(self.hidden[rows], self.weight.t(), out=logits[:, : self.vocab_size])
            if self.widens and logits.dtype != self.exact:
                logits = self.buffer[:size].copy_(logits)
            if self.bias is not None:
                logits[:, : self.vocab_size] += self.bias
            logits[:, self.vocab_size :] = float("-inf")
            if self.mask_id is not None:
                exclude_token_(logits, self.mask_id)
            yield rows, logits

    def narrow(self, gradient: Tensor) -> Tensor:
        """Return the gradient in the logits, without padding and as a factor of the gradients' products: (n, V)."""
        if self.backward_dtype != self.exact:
            gradient = self._narrow(len(gradient)).copy_(gradient)
        return gradient[:, : self.vocab_size]

    def _narrow(self, rows: int) -> Tensor:
        """Return a buffer of the dtype of the products' factors."""
        if self.narrowed is None:
            self.narrowed = self._buffer(self.hidden.dtype)
        return self.narrowed[:rows]

    def empty(self, statistics: Collection[Statistic], nll: bool) -> Prediction:
        """Room for what is wanted of all positions."""
        names: list[str] = [*statistics, *(["nll"] if nll else [])]
        dtypes = {name: torch.long if name == "token" else self.exact for name in names}
        return Prediction(**{name: self.hidden.new_empty(len(self.hidden), dtype=dtypes[name]) for name in names})


def _summarise(
    head: _Head, logits: Tensor, target: Tensor | None, found: Prediction, rows: slice
) -> tuple[Tensor, Tensor]:
    """Write what is wanted of a chunk to its rows; the buffer holds its softmax then, but for a factor.

    Returns:
        The buffer, (n, V and padding), and what to divide it by, (n, 1).
    """
    top, token = logits.max(-1)
    at_target = None if target is None else logits.gather(1, target[:, None])[:, 0].to(head.exact)
    top = top.to(head.exact)
    buffer = head.buffer[: len(logits)]
    total = _exponentials(logits, top, buffer, head.fused)
    # top - logsumexp, without another pass; exact where it is close to 0.
    top_value = buffer.gather(1, token[:, None])
    log_prob = (top_value / total)[:, 0].log()
    if found.nll is not None:
        assert at_target is not None
        found.nll[rows] = top - at_target - log_prob
    if found.token is not None:
        found.token[rows] = token
    if found.log_prob is not None:
        found.log_prob[rows] = log_prob
    if found.entropy is not None:
        found.entropy[rows] = torch.special.entr(buffer).sum(-1) / total[:, 0] + total[:, 0].log()
    if found.margin is not None:
        # Two passes for the maximum beat a topk.
        buffer.scatter_(1, token[:, None], 0.0)
        found.margin[rows] = (top_value[:, 0] - buffer.amax(-1)) / total[:, 0]
        buffer.scatter_(1, token[:, None], top_value)
    return buffer, total


def _exponentials(logits: Tensor, top: Tensor, buffer: Tensor, fused: bool) -> Tensor:
    """Fill a buffer, (n, V), with a multiple of the softmax of logits, whose maxima are ``top``, (n,).

    Returns:
        What it is a multiple by, (n, 1).
    """
    if fused:
        torch.softmax(buffer, -1, out=buffer)
        return buffer.new_ones(len(buffer), 1)
    # Dividing would be one more pass; what comes next divides smaller factors.
    torch.sub(logits, top[:, None], out=buffer).exp_()
    return buffer.sum(-1, keepdim=True)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute ``out = a @ b``, with a float32 result also of half-precision factors."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute ``total += a @ b``, with a float32 sum also of half-precision factors."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


def _padded(vocab_size: int) -> int:
    return vocab_size + -vocab_size % ALIGNMENT


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Collection[Statistic],
    per_position: dict[str, Tensor],
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden: expected hidden states (N, D) and a weight (V, D), got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}; flatten the positions"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected (V,) = ({len(weight)},), got {tuple(bias.shape)}; give one for each token")
    for name, tensor in per_position.items():
        if tensor.shape != hidden.shape[:1]:
            raise ValueError(
                f"{name}: expected (N,) = ({len(hidden)},), got {tuple(tensor.shape)}; give one for each position"
            )
    unknown = sorted(set(statistics) - {"token", "log_prob", "margin", "entropy"})
    if unknown:
        raise ValueError(
            f"statistics: expected some of token, log_prob, margin, entropy, got {', '.join(unknown)}; leave that out"
        )
