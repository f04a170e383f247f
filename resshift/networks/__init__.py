"""Networks of the method: U-Net with Swin blocks, VQ autoencoder, discriminator, and their layers."""
