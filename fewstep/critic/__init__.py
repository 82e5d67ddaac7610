"""What methods with a critic share: its denoising loss, its discriminator, its guidance, decoupled matching."""
