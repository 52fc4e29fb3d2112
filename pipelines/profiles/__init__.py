"""Profiles that ship: see `modelmill.pipelines.platform`."""
