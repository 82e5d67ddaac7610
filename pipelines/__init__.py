"""Pipelines that stock diffusers lacks, one self-contained file each, copied into the folders of students.

They import torch and diffusers only. All other students are stock pipelines with a stock scheduler.
"""
