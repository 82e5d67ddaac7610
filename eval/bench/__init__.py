"""What `fewstep bench` measures: kernels, network calls, training steps and the demo's training, on this machine."""
