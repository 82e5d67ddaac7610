"""Which stock scheduler carries a student, and the proof by a walk: every time, every move, every answer."""
