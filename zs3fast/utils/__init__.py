"""What every room needs and none owns: files, images, rendering, checkpoints, constants, options, the console."""
