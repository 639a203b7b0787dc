"""Re-exports nnunet_dsp's trainers for nnU-Net's lookup, which imports this file as `nnunet_dsp_trainers`, top level.

Nothing may be defined here: nnU-Net forgets this module after the search, the classes live on in nnunet_dsp.trainers.
"""

import sys

try:
    from nnunet_dsp.trainers import *  # noqa: F403
except ModuleNotFoundError as error:
    if error.name != "nnunet_dsp":
        raise  # a trainer's own missing dependency: nnU-Net passes it on, the user must see it
    raise ImportError(
        f"nnUNet_extTrainer names {__file__}'s folder, but nnunet_dsp is not installed in {sys.executable}.\n"
        "Install nnunet_dsp there, or take the folder out of nnUNet_extTrainer; if `nnunet_dsp register` put it there, "
        "delete nnunet_dsp_trainers.pth in that Python's site-packages."
    ) from error
