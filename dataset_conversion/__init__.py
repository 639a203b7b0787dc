"""Datasets: from other formats to nnU-Net's, from masks to simulated weak labels, from a user's folder to training.

One module per job, one module per source format (`formats/`). No torch; nnunetv2 is imported only where it is needed.
"""
