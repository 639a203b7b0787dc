"""JSON Schemas of the files that nnunet_dsp reads, shipped as package data."""
