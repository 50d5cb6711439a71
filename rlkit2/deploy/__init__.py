"""Policies in other programs: files that run without rlkit2, and hubs where runs are shared."""

from rlkit2.deploy.export import Export as Export
from rlkit2.deploy.export import export_policy as export_policy
from rlkit2.deploy.hub import pull as pull
from rlkit2.deploy.hub import push as push
