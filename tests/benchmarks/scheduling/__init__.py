"""Every policy under every load, measured on the real gateway and predicted by the simulator: `make bench-scheduling`."""
