"""What stock diffusers cannot express. Every file here is self-contained: torch and diffusers only.

Empty so far: every student of the methods in ``fewstep.trainers`` is a stock pipeline with a stock scheduler.
"""
