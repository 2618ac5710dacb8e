"""The C layouts of nvml.h that the simulated library reads and writes through the caller's pointers.

Declared here from the header, not taken from pynvml: that is the point of crossing real ctypes. A wrong
offset in either shows up as a wrong number in a test, not as agreement.
"""

from ctypes import (
    Structure,
    Union,
    c_char,
    c_double,
    c_int,
    c_int64,
    c_longlong,
    c_uint,
    c_ulonglong,
    c_void_p,
)

NAME_SIZE = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE

# A version word is the struct's size with its version in the top byte.
GI_PROFILE_INFO_V2 = 0x02000098
GI_PROFILE_INFO_V3 = 0x03000098
CI_PROFILE_INFO_V2 = 0x02000088
MEMORY_V2 = 0x02000028

CAPABILITY_GFX = 0x2


class PciInfo(Structure):
    _fields_ = (
        ("bus_id_legacy", c_char * 16),
        ("domain", c_uint),
        ("bus", c_uint),
        ("device", c_uint),
        ("pci_device_id", c_uint),
        ("pci_subsystem_id", c_uint),
        ("bus_id", c_char * 32),
    )


class Memory(Structure):
    _fields_ = (("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong))


class MemoryV2(Structure):
    _fields_ = (
        ("version", c_uint),
        ("total", c_ulonglong),
        ("reserved", c_ulonglong),
        ("free", c_ulonglong),
        ("used", c_ulonglong),
    )


class Utilization(Structure):
    _fields_ = (("gpu", c_uint), ("memory", c_uint))


class ProcessInfo(Structure):
    _fields_ = (
        ("pid", c_uint),
        ("used_gpu_memory", c_ulonglong),
        ("gpu_instance_id", c_uint),
        ("compute_instance_id", c_uint),
    )


class Value(Union):
    _fields_ = (
        ("double_value", c_double),
        ("uint_value", c_uint),
        ("ullong_value", c_ulonglong),
        ("llong_value", c_longlong),
    )


class FieldValue(Structure):
    _fields_ = (
        ("field_id", c_uint),
        ("scope_id", c_uint),
        ("timestamp", c_int64),
        ("latency_usec", c_int64),
        ("value_type", c_uint),
        ("nvml_return", c_int),
        ("value", Value),
    )


class Placement(Structure):
    _fields_ = (("start", c_uint), ("size", c_uint))


class GiProfileInfo(Structure):
    _fields_ = (
        ("id", c_uint),
        ("is_p2p_supported", c_uint),
        ("slice_count", c_uint),
        ("instance_count", c_uint),
        ("multiprocessor_count", c_uint),
        ("copy_engine_count", c_uint),
        ("decoder_count", c_uint),
        ("encoder_count", c_uint),
        ("jpeg_count", c_uint),
        ("ofa_count", c_uint),
        ("memory_size_mb", c_ulonglong),
    )


class GiProfileInfoV2(Structure):
    _fields_ = (("version", c_uint), *GiProfileInfo._fields_, ("name", c_char * NAME_SIZE))


class GiProfileInfoV3(Structure):
    """Version 3 has no P2P field; it has a mask of capabilities at its end."""

    _fields_ = (
        ("version", c_uint),
        *(field for field in GiProfileInfo._fields_ if field[0] != "is_p2p_supported"),
        ("name", c_char * NAME_SIZE),
        ("capabilities", c_uint),
    )


class GiInfo(Structure):
    _fields_ = (("device", c_void_p), ("id", c_uint), ("profile_id", c_uint), ("placement", Placement))


class CiProfileInfo(Structure):
    _fields_ = (
        ("id", c_uint),
        ("slice_count", c_uint),
        ("instance_count", c_uint),
        ("multiprocessor_count", c_uint),
        ("shared_copy_engine_count", c_uint),
        ("shared_decoder_count", c_uint),
        ("shared_encoder_count", c_uint),
        ("shared_jpeg_count", c_uint),
        ("shared_ofa_count", c_uint),
    )


class CiProfileInfoV2(Structure):
    _fields_ = (("version", c_uint), *CiProfileInfo._fields_, ("name", c_char * NAME_SIZE))


class CiInfo(Structure):
    _fields_ = (
        ("device", c_void_p),
        ("gpu_instance", c_void_p),
        ("id", c_uint),
        ("profile_id", c_uint),
        ("placement", Placement),
    )


class DeviceAttributes(Structure):
    _fields_ = (
        ("multiprocessor_count", c_uint),
        ("shared_copy_engine_count", c_uint),
        ("shared_decoder_count", c_uint),
        ("shared_encoder_count", c_uint),
        ("shared_jpeg_count", c_uint),
        ("shared_ofa_count", c_uint),
        ("gpu_instance_slice_count", c_uint),
        ("compute_instance_slice_count", c_uint),
        ("memory_size_mb", c_ulonglong),
    )


class EventData(Structure):
    _fields_ = (
        ("device", c_void_p),
        ("event_type", c_ulonglong),
        ("event_data", c_ulonglong),
        ("gpu_instance_id", c_uint),
        ("compute_instance_id", c_uint),
    )
