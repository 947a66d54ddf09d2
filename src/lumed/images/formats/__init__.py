"""The formats in which registries hold disks: each reads a manifest and says where bytes go."""
