# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of two nodes with a processor each, on 127.0.0.1, as a program: tells its address, and ends with its
input."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    here = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**here, "include_dashboard": False})
    cluster.add_node(**here)
    cluster.wait_for_nodes()
    print(f"address {cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
