"""Time, memory and energy of arms, and the inputs they run on."""
