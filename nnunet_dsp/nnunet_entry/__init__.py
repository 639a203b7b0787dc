"""The folder that nnUNet_extTrainer points at. It holds one module, which re-exports the trainers, and nothing else.

nnU-Net imports every module in this folder under its bare name. Pointed at the trainers themselves, it would make a
second copy of every class, which breaks isinstance and pickling.
"""
