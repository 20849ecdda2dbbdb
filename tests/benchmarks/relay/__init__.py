"""What the relay costs beside nginx, a Rust router and plain httpx: `make bench-relay`."""
