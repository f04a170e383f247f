"""Image quality metrics: PSNR, SSIM, NIQE, LPIPS."""
