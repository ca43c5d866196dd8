"""`python -m torchrunx_ray` is the command `torchrunx-ray`."""

from torchrunx_ray.cli.main import main

if __name__ == "__main__":
    main()
