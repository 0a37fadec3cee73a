"""Backends, which execute plans: a record each, all with the same ``run`` signature. `register` adds a user's own."""

from flexjag.backends.base import Backend as Backend
from flexjag.backends.base import Case as Case
from flexjag.backends.base import Promises as Promises
from flexjag.backends.choose import register as register
from flexjag.backends.choose import unregister as unregister
