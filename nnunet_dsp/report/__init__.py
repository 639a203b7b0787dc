"""The report of `nnunet_dsp check`: what was understood of a dataset, as findings, counts, pictures and one page."""
