"""nnUNetTrainerPromptOneShot: nnUNetTrainerPrompt on a single training case."""

from __future__ import annotations

from nnunet_dsp.prompt_choice import PromptRequest
from nnunet_dsp.prompt_settings import PROMPT_PLANS_KEY
from nnunet_dsp.trainers.nnUNetTrainerPrompt import nnUNetTrainerPrompt


class nnUNetTrainerPromptOneShot(nnUNetTrainerPrompt):
    """Trains on one case of the fold; the prompt comes from another one.

    The prompt's case is the one dataset.json names, or the fold's first annotated case. The training case is the
    setting `one_shot_case`, or the first annotated case that is not the prompt's; with a single annotated case it is
    that one, and the prompt is a window of it. The labels of all other training cases stay unused. Classes that the
    prompt's case does not show are looked for in the training case.
    """

    def do_split(self) -> tuple[list[str], list[str]]:
        training, validation = self._annotated_split()
        chosen = self._one_shot_case(training, self._requests())
        self.print_to_log_file(f"One-shot: {chosen} alone is trained on, of {len(training)} annotated training cases.")
        return [chosen], validation

    def _one_shot_case(self, training: list[str], requests: list[PromptRequest]) -> str:
        wanted = self.settings.one_shot_case
        if wanted:
            if wanted not in training:
                raise ValueError(
                    f'Setting `one_shot_case` under "{PROMPT_PLANS_KEY}" in the plans names {wanted!r}, which is no '
                    f"annotated training case of fold {self.fold}. There are: {', '.join(sorted(training)[:10])}."
                )
            return wanted
        prompts = {request.case for request in requests} or {self._prompt_case(training)}
        return next((case for case in sorted(training) if case not in prompts), sorted(training)[0])

    def _prompt_case(self, training: list[str]) -> str:
        others = [case for case in sorted(training) if case != self.settings.one_shot_case]
        return (others or training)[0]

    def _prompt_groups(self, requests: list[PromptRequest]) -> list[list[str]]:
        training, _ = self._annotated_split()
        return [[self._prompt_case(training)], [self._one_shot_case(training, requests)]]


__all__ = ["nnUNetTrainerPromptOneShot"]
