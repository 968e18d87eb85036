"""The methods of training, by the name that a recipe gives them."""

from methods.base import Features, Method
from methods.cbswr import CBSwRMethod
from methods.deepcluster import DeepCluster
from methods.soft_centers import SoftCenters
from methods.stml import STML
from methods.supervised import MultiSimilarity, ProxyAnchor

METHODS: dict[str, type[Method]] = {
    "cbswr": CBSwRMethod,
    "soft_centers": SoftCenters,
    "stml": STML,
    "deepcluster": DeepCluster,
    "proxy_anchor": ProxyAnchor,
    "multi_similarity": MultiSimilarity,
}

__all__ = ["METHODS", "Features", "Method"]
