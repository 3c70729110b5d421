"""Every exception that Heliostat raises on purpose.

    HeliostatError            exit 1: something failed on the way
    ├── UsageError            exit 3: what was asked for cannot be done as asked
    │   ├── ConfigError       a recipe or an override is wrong
    │   ├── SourceError       a data source is missing or holds nothing usable
    │   ├── StorageRootError  the storage root cannot be written or is not shared
    │   ├── CapacityError     the cluster cannot hold what the recipe asks for
    │   └── PortError         the HTTP port is taken
    ├── GateRefused           exit 2: a quality gate said no
    ├── ArtifactError         a stored artifact is missing, damaged or of a newer format
    ├── StorageError          reading or writing storage failed (full, read-only, gone)
    ├── PrivacyError          personal data could not be taken out of a text
    ├── TrainingError         a training run could not go on
    ├── ServingError          the served application did not come up
    └── ClusterError          a cluster is not reached, or not as it must be

A message states the relation that does not hold, with its numbers, and the cure. It is shown to the
user as one line without a traceback; anything else that escapes is a fault of ours.
"""


class HeliostatError(Exception):
    exit_code = 1


class UsageError(HeliostatError):
    exit_code = 3


class ConfigError(UsageError, ValueError):
    pass


class SourceError(UsageError):
    pass


class StorageRootError(UsageError):
    pass


class CapacityError(UsageError):
    pass


class PortError(UsageError):
    pass


class GateRefused(HeliostatError):
    exit_code = 2


class ArtifactError(HeliostatError):
    pass


class StorageError(HeliostatError):
    pass


class PrivacyError(HeliostatError):
    pass


class TrainingError(HeliostatError):
    pass


class ServingError(HeliostatError):
    pass


class ClusterError(HeliostatError):
    pass
