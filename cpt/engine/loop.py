"""The training loop of one stage on one rank. Every rank runs it; all decisions are made from numbers that all share.

At the top of each turn, in this order:

    1. evaluation due at this step and not done yet   → measure; a guard may end the run
    2. all steps done                                 → save as the stage's end
    3. a stop was asked for on any rank               → save and leave
    4. one step draw · forward, backward · reduce · `grad` hooks · clip · optimizer · `update` hooks
    5. a checkpoint due                               → save

A checkpoint says which evaluation was the last complete one, so a kill in an evaluation repeats it.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from cpt.base import pulse
from cpt.base.errors import StageFailed
from cpt.base.records import to_json
from cpt.data import stream as streams
from cpt.data.stream import Stream
from cpt.data.validation import ValidSet
from cpt.engine import anomalies, megatron
from cpt.engine.evaluate import validation_losses
from cpt.engine.lr import check_lr
from cpt.engine.ports import Engine, Progress, Reporter, Saver
from cpt.engine.signals import StopFlag
from cpt.methods import Method
from cpt.plan.types import Train

Outcome = Literal["done", "saved", "guard", "rollback"]
BROKEN_IMPORT = 0.8  # of ln V: a trained model is far below the loss of a uniform guess


class Loop:
    """A stage from where `progress` says to its end, a stop, a guard or a rollback.

    Args:
        engine: built for training, with its weights in place.
        train: the stage.
        stream: its data, placed at `progress`.
        valid: held-out sets by source.
        progress: changed as the loop goes on.
        curve: lr of each stage step.
        saver, report: see `ports`.
        stop: the stop flag, installed.
        dp_rank: number of this rank's model copy.
        methods: hooks, in the order of the plan.
        skip_steps: steps whose samples are left out, with the step from which the run was rolled back.
        keep_steps: steps that must leave a checkpoint for a later stage.
        imported: the weights come from outside and have not been trained here yet.
    """

    def __init__(
        self,
        engine: Engine,
        train: Train,
        stream: Stream,
        valid: Mapping[str, ValidSet],
        progress: Progress,
        curve: Callable[[int], float],
        saver: Saver,
        report: Reporter,
        stop: StopFlag,
        dp_rank: int,
        methods: Sequence[Method] = (),
        skip_steps: Mapping[int, int] | None = None,
        keep_steps: Sequence[int] = (),
        imported: bool = False,
    ) -> None:
        self.engine, self.train, self.stream, self.valid = engine, train, stream, valid
        self.progress, self.curve, self.saver, self.report = progress, curve, saver, report
        self.stop, self.dp_rank, self.methods = stop, dp_rank, methods
        self.skip_steps = skip_steps or {}
        self.keep_steps = frozenset(keep_steps)
        self.imported = imported
        self.sources = [streams.key(name) for name in stream.names]
        self.skips_in_a_row = 0
        self.lr_is_checked = False
        self.rollback_step = -1  # where the last outcome `rollback` was decided
        self.rollback_reason = ""
        self._since = time.monotonic()
        self._steps_since = 0
        self._data_s = 0.0  # of the last step: time spent on getting its samples
        self._begun = 0.0  # when its forward and backward passes began

    def run(self) -> Outcome:
        """Go on until the stage is done or something ends it before."""
        while True:
            if self._evaluation_is_due():
                outcome = self._evaluate()
                if outcome:
                    return outcome
            if self.progress.step >= self.train.steps:
                self._save("end")
                self.saver.wait()
                return "done"
            pulse.current.say(pulse.STEP, self.progress.step + 1)
            if self.stop.agreed():
                return self._leave("a stop was asked for")
            if self._step() == anomalies.ROLLBACK:
                self.saver.wait()
                return "rollback"
            self._save_if_due()

    # --- evaluation ---

    def _evaluation_is_due(self) -> bool:
        step, plan = self.progress.step, self.train.evaluate
        if not self.valid or self.progress.last_eval == step:
            return False
        if step == 0:
            return plan.at_start or self.train.stop_if is not None
        return step == self.train.steps or bool(plan.every_steps and step % plan.every_steps == 0)

    def _evaluate(self) -> Outcome | None:
        step = self.progress.step
        pulse.current.say(pulse.EVAL, step)
        start = time.monotonic()
        found = validation_losses(
            self.engine,
            self.valid,
            micro_batch_size=self.train.micro_batch_size,
            dp_rank=self.dp_rank,
            stopped=self.stop.agreed,
        )
        if found is None:
            return self._leave("a stop was asked for during an evaluation")
        when = "start" if step == 0 else "end" if step == self.train.steps else "during"
        seconds = time.monotonic() - start
        self.report("eval", step=step, tokens=self.progress.tokens, when=when, losses=found, seconds=round(seconds, 3))
        self.progress.last_eval = step
        self._since += seconds
        losses = {name: values["loss"] for name, values in found.items()}
        self.progress.newest_eval = losses
        if step == 0:
            self.progress.first_eval = losses
            if self.imported:
                self._check_import(min(losses.values()), "validation loss")
        if self._guard(losses):
            self.progress.last_eval = -1  # the same command measures again and ends here again
            self._save("train")
            self.saver.wait()
            return "guard"
        return None

    def _check_import(self, loss: float, what: str) -> None:
        """A base that predicts hardly better than a uniform guess was probably not read as it was written."""
        self.imported = False
        guess = math.log(self.engine.model.vocab_size)
        limit = BROKEN_IMPORT * guess
        if self.train.broken_import_guard and loss > limit:
            raise StageFailed(
                f"the first {what} of the imported base is {loss:.2f} nats/token, above {limit:.2f} "
                f"({BROKEN_IMPORT:g} of the {guess:.2f} of a uniform guess): it looks as if it was not read as it was "
                "trained",
                "suspects: the tokenizer is another one, the tensor mapping is wrong, or the base needs a BOS token "
                "(`data.bos=true`)",
                "if the text is only far from what the base knows, as a new language is, "
                "`train.broken_import_guard=false` trains all the same",
            )

    def _guard(self, losses: Mapping[str, float]) -> bool:
        rule = self.train.stop_if
        if rule is None or rule.source not in losses or rule.source not in self.progress.first_eval:
            return False
        before, now = self.progress.first_eval[rule.source], losses[rule.source]
        limit = before * (1 + rule.loss_rises)
        if now <= limit:
            return False
        self.report("guard", source=rule.source, before=before, now=now, limit=limit, step=self.progress.step)
        return True

    # --- one step ---

    def _step(self) -> str:
        """Make one step; gives the verdict about its loss and gradients."""
        step = self.progress.step
        start = time.monotonic()
        if step in self.skip_steps:
            self.stream.skip()
            self._count(step, loss=None, losses={}, norm=None, left_out=self.skip_steps[step])
            return anomalies.SKIP
        self._set_weights(step)
        loss, by_source = self._forward_backward()
        if self.imported:
            self._check_import(loss, "training loss")
        verdict, why = anomalies.judge(loss, self.progress.losses, self.train.anomalies)
        norm = None
        if verdict in (anomalies.UPDATE, anomalies.WARN):
            for method in self.methods:
                method.grad(self.engine, step)
            norm = megatron.grad_norm(self.engine)
            bad = anomalies.judge_grad_norm(norm, self.train.anomalies)
            if bad[0] != anomalies.UPDATE:
                verdict, why = bad
        if verdict == anomalies.STOP:
            raise StageFailed(f"step {step + 1}: {why}", "`train.anomalies` says what is done about it")
        if verdict == anomalies.ROLLBACK:
            self.rollback_step, self.rollback_reason = step, why
            return verdict
        skipped = verdict == anomalies.SKIP
        if not skipped:
            self._update(step, norm if norm is not None else 0.0)
            self.progress.losses = [*self.progress.losses, loss][-self.train.anomalies.window :]
        self._book_time(start)
        self._count(step, loss=loss, losses=by_source, norm=norm, why=why, skipped=skipped)
        return verdict

    def _book_time(self, start: float) -> None:
        """Tell the pulse where this step's time went. What a rank does alone is known only where it has no partners
        inside its model copy."""
        layout = self.train.parallel
        alone = layout.tp == layout.pp == 1 < layout.dp
        own = pulse.current.gradients_ready - self._begun if alone else 0.0
        pulse.current.spent(data_s=self._data_s, own_s=own, step_s=time.monotonic() - start)

    def _set_weights(self, step: int) -> None:
        for method in self.methods:
            shares = method.weights(step, self.progress.newest_eval)
            if shares is not None:
                self.stream.set_shares({n: shares.get(streams.key(n), 0.0) for n in self.stream.names})

    def _forward_backward(self) -> tuple[float, dict[str, float]]:
        """Mean loss of the global batch and of each source that gave samples [nats/token]; gradients are ready."""
        start = time.monotonic()
        batch = self.stream.batch(self.dp_rank, self.train.parallel.dp)
        self._data_s = time.monotonic() - start
        batches = megatron.microbatches(
            batch.tokens_BS1,
            batch.loss_mask_BS,
            batch.position_ids_BS,
            batch.segment_ids_BS,
            micro_batch_size=self.train.micro_batch_size,
            device=self.engine.device,
        )
        self._begun = time.monotonic()
        hook = self._loss_hook if any(type(m).loss is not Method.loss for m in self.methods) else None
        losses = megatron.forward_backward(self.engine, batches, loss_hook=hook)
        sums, tokens = megatron.reduce_by_source(self.engine, losses, batch.source_B, len(self.sources))
        by_source = {s: n / t for s, n, t in zip(self.sources, sums, tokens, strict=True) if t}
        return sum(sums) / max(sum(tokens), 1), by_source

    def _loss_hook(self, losses_BS: torch.Tensor, microbatch: megatron.Microbatch) -> torch.Tensor:
        for method in self.methods:
            losses_BS = method.loss(self.engine, losses_BS, microbatch)
        return losses_BS

    def _update(self, step: int, norm: float) -> None:
        lr = self.curve(step)
        megatron.update(self.engine, lr, norm)
        if not self.lr_is_checked:
            check_lr(self.engine.optimizer, lr, step + 1)
            self.lr_is_checked = True
        for method in self.methods:
            method.update(self.engine, step)

    def _count(
        self,
        step: int,
        *,
        loss: float | None,
        losses: Mapping[str, float],
        norm: float | None,
        why: str = "",
        skipped: bool = True,
        left_out: int | None = None,
    ) -> None:
        """Book a step and report it.

        Args:
            why: something was wrong with it.
            left_out: not made after a rollback from this step, which was told then.
        """
        progress, train = self.progress, self.train
        progress.step += 1
        progress.run_step += 1
        progress.tokens += train.global_batch_size * train.seq_length
        progress.run_tokens += train.global_batch_size * train.seq_length
        progress.cursors = self.stream.state()
        lr = self.curve(step)
        progress.lr = {"last": lr, "lr": to_json(train.lr)}
        progress.methods = {type(m).__name__: m.state() for m in self.methods}
        self._steps_since += 1
        if why:
            done = "the update was skipped" if skipped else "the update was made"
            self.report("warning", step=progress.step, text=f"step {progress.step}: {why}; {done}")
        if left_out is not None:
            why = f"left out after a rollback from step {left_out}"
        if progress.step % train.log_every == 0 or progress.step in (1, train.steps) or why:
            now = time.monotonic()
            seconds = max(now - self._since, 1e-9) / self._steps_since
            self._since, self._steps_since = now, 0
            self.report(
                "step",
                step=progress.step,
                tokens=progress.tokens,
                loss=loss,
                lr=lr,
                grad_norm=norm,
                tokens_per_s=round(train.global_batch_size * train.seq_length / seconds, 1),
                step_s=round(seconds, 4),
                losses=dict(losses),
                given=self.stream.given,
                memory_bytes=_memory(),
                **({"skipped": why} if skipped else {}),
                **({"left_out": left_out} if left_out is not None else {}),
            )
        if left_out is None:
            self._count_skips(skipped, why)

    def _count_skips(self, skipped: bool, why: str) -> None:
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        if self.skips_in_a_row > self.train.anomalies.max_skips:
            raise StageFailed(
                f"step {self.progress.step}: {self.skips_in_a_row} updates in a row were skipped; last reason: {why}",
                "a lower lr, or a look at the data around this step, is the usual cure",
            )

    # --- checkpoints ---

    def _save_if_due(self) -> None:
        step = self.progress.step
        if step == self.train.steps:
            return  # saved as the end, after the last evaluation
        if step in self.keep_steps:
            self._save("pre_anneal")
        elif self.train.saving.every_steps and step % self.train.saving.every_steps == 0:
            self._save("train")

    def _save(self, phase: str) -> None:
        pulse.current.say(pulse.SAVE, self.progress.step)
        start = time.monotonic()
        path = self.saver.save(self.engine, self.progress, phase=phase)
        seconds = time.monotonic() - start
        self._since += seconds
        self.report("save", step=self.progress.step, path=str(path), seconds=round(seconds, 3), phase=phase)

    def _leave(self, reason: str) -> Outcome:
        if self.progress.step > 0:
            self._save("stop")
            self.saver.wait()
        self.report("stop", reason=f"{reason} ({self.stop.reason})", step=self.progress.step)
        return "saved"


def _memory() -> int:
    """Most memory this rank has used so far: of the GPU where there is one, else of the process [bytes]."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
