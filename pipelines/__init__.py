"""What stock diffusers cannot express. Every file here is self-contained: torch and diffusers only.

A student that needs one has a copy of it in its folder. All others are stock pipelines with a stock scheduler.
"""
