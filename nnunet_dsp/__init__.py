"""nnunet_dsp: nnU-Net v2 trained from any mixture of masks, scribbles, boxes, points and tags.

Only the version stands here: importing the package must stay cheap, because every command starts with it.
"""

__version__ = "0.1.0"
