"""Defines the base class of the workers' exceptions and documents their tree.

The library's tree is in `megatron_ray.exceptions`; this one extends it. Each class is
defined beside the code that raises it:

    MegatronRayError                        internal
    ├── InputError                          user
    │   ├── UserError                       rank.messages
    │   ├── CredentialsError                rank.environment
    │   └── InterfaceError                  rank.environment
    └── WorkersError                        internal
        ├── PlacementError                  decisions.placement
        ├── InvalidTransitionError          decisions.job_phases
        ├── JournalError                    driver.journal
        ├── ForeignJournalError             driver.journal
        ├── DriverReplacedError             driver.context
        ├── ReplacedError                   service_client
        ├── ServiceUnavailableError         service_client
        ├── ServiceRefusedError             service_client
        ├── WorkerGroupError                ray.answers
        ├── TaskFailedError                 ray.tasks
        ├── NodeGroupsError                 agent.node_groups
        ├── ProcessEnvironmentError         rank.environment
        ├── FencedError                     rank.messages
        └── BusyError                       rank.messages

A rank reports the `failure_kind` of the exception that ended it, so that renaming a
class never changes whether an attempt is tried again.
"""

from megatron_ray.exceptions import MegatronRayError


class WorkersError(MegatronRayError):
    """Base of the exceptions that agent, driver and ranks define."""
