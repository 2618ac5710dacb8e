"""What an XID means: NVIDIA's action, whom it concerns, and whether that leaves a device fit to be given out.

Mnemonics and actions are those of NVIDIA's XID catalogue
(docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html, as three public copies of 2025-2026 agree on
it); 173 to 176 are only in the driver header nverror.h of 595.45.04, and 999 is NVML's own placeholder for
a code that it does not know. Scope and kind are our reading of the same sources, of the driver source and of
what DCGM, GKE, EKS, Azure, gpud and the DRA driver make of each code. "-" is: not in the catalogue, or blank.

The action decides. RESTART_APP and IGNORE, and 45 (channels cleaned up behind another error), leave the
device healthy. 94 does not, though its action is RESTART_APP: its memory error is contained in one
instance, which is unfit until it is made anew. Any other action, none, and a code that is not in the
table make sick. For `gpu` and `link` that is the whole GPU, whatever instance the driver names; for
`process` and `instance` the event's own scope.

NVIDIA's plugin knows no table: it ignores `IGNORED_BY_NVIDIA` and takes every other code for fatal. So
`differs_from_nvidia` is true of 64 codes that are healthy here and mark a device there, and of 109 the
other way.
"""

from collections.abc import Collection
from dataclasses import dataclass

RECOVERY_ACTION_CHANGED = 154
UNCORRECTED_ECC = -1  # no XID: the driver counts more uncorrected memory errors than before
_LEAVE_HEALTHY = frozenset({"RESTART_APP", "IGNORE", "WORKFLOW_XID_45"})
_CONTAINED = "contained"
_WHOLE_GPU = frozenset({"gpu", "link"})

IGNORED_BY_NVIDIA = frozenset({13, 31, 43, 45, 68, 109})


@dataclass(frozen=True, slots=True)
class Xid:
    """One code; `mnemonic`, `action` and `kind` are "" where nobody says."""

    code: int
    mnemonic: str = ""
    action: str = ""
    scope: str = ""
    kind: str = ""

    @property
    def is_known(self) -> bool:
        return bool(self.scope)

    @property
    def is_contained(self) -> bool:
        """Whether the harm is confined to one instance, and over when that is made anew or left alone."""
        return self.kind == _CONTAINED

    @property
    def makes_sick(self) -> bool:
        return self.is_contained or self.action not in _LEAVE_HEALTHY

    @property
    def concerns_gpu(self) -> bool:
        """Whether it concerns the whole GPU, whatever instance an event names."""
        return self.scope in _WHOLE_GPU

    @property
    def differs_from_nvidia(self) -> bool:
        """Whether NVIDIA's plugin v0.20 judges otherwise."""
        return self.makes_sick == (self.code in IGNORED_BY_NVIDIA)

    def __str__(self) -> str:
        if self.code == UNCORRECTED_ECC:
            return "uncorrected memory errors (ECC)"
        told = " ".join(filter(None, (self.mnemonic, self.action and f"({self.action})")))
        return f"XID {self.code} {told or '(not in the table)'}"


def xid(code: int) -> Xid:
    """What is known of `code`. Memory errors that are only counted did their harm where they were counted."""
    if code == UNCORRECTED_ECC:
        return Xid(code, scope="instance", kind=_CONTAINED)
    return TABLE.get(code) or Xid(code)


@dataclass(frozen=True, slots=True)
class Checks:
    """Which XIDs count, as DP_DISABLE_HEALTHCHECKS and DP_ENABLE_HEALTHCHECKS say.

    None is all of them. What is enabled makes sick whatever the table or `disabled` say. `signs`: whether
    the driver's other signs of a bad GPU count.
    """

    disabled: frozenset[int] | None = frozenset()
    enabled: frozenset[int] | None = frozenset()
    signs: bool = True

    def make_sick(self, found: Xid) -> bool:
        if found.code == UNCORRECTED_ECC:
            return self.signs
        if self.enabled is None or found.code in self.enabled:
            return True
        return self.disabled is not None and found.code not in self.disabled and found.makes_sick


def parse_checks(disable: str, enable: str) -> tuple[Checks, tuple[str, ...]]:
    """The checks of NVIDIA's two variables, and the words in them that mean nothing.

    Each is a list, separated by commas, of XIDs, or of `xids` or `all` for every XID; to disable `all` also
    puts off the checks that are not XIDs. An XID that is enabled by number counts also under
    disabled `all`, which NVIDIA documents and its plugin does not do; and 0 is no word for all.
    """
    off, no_words = _words(disable)
    on, other_words = _words(enable)
    checks = Checks(_codes(off), _codes(on), signs="all" not in off or "all" in on)
    return checks, (*no_words, *other_words)


def _words(text: str) -> tuple[list[str], list[str]]:
    words = [word for part in text.lower().split(",") if (word := part.strip())]
    good = [word for word in words if word in {"all", "xids"} or (word.isascii() and word.isdigit())]
    return good, [word for word in words if word not in good]


def _codes(words: Collection[str]) -> frozenset[int] | None:
    if {"all", "xids"} & set(words):
        return None
    return frozenset(map(int, words))


_ROWS = """
1 ROBUST_CHANNEL_FIFO_ERROR_FIFO_METHOD CONTACT_SUPPORT process driver
2 ROBUST_CHANNEL_FIFO_ERROR_SW_METHOD CONTACT_SUPPORT process driver
3 ROBUST_CHANNEL_FIFO_ERROR_UNK_METHOD CONTACT_SUPPORT process driver
4 ROBUST_CHANNEL_FIFO_ERROR_CHANNEL_BUSY CONTACT_SUPPORT process driver
5 ROBUST_CHANNEL_FIFO_ERROR_RUNOUT_OVERFLOW CONTACT_SUPPORT process unknown
6 ROBUST_CHANNEL_FIFO_ERROR_PARSE_ERR CONTACT_SUPPORT process driver
7 ROBUST_CHANNEL_FIFO_ERROR_PTE_ERR CONTACT_SUPPORT process driver
8 ROBUST_CHANNEL_FIFO_ERROR_IDLE_TIMEOUT RESTART_APP process application
9 ROBUST_CHANNEL_GR_ERROR_INSTANCE CONTACT_SUPPORT process driver
10 ROBUST_CHANNEL_GR_ERROR_SINGLE_STEP CONTACT_SUPPORT process unknown
11 ROBUST_CHANNEL_GR_ERROR_MISSING_HW RESTART_APP process application
12 ROBUST_CHANNEL_GR_ERROR_SW_METHOD CONTACT_SUPPORT process driver
13 ROBUST_CHANNEL_GR_EXCEPTION/ROBUST_CHANNEL_GR_ERROR_SW_NOTIFY RESTART_APP process application
14 ROBUST_CHANNEL_FAKE_ERROR IGNORE process informational
15 ROBUST_CHANNEL_SCANLINE_TIMEOUT CONTACT_SUPPORT gpu unknown
16 ROBUST_CHANNEL_VBLANK_CALLBACK_TIMEOUT CONTACT_SUPPORT gpu driver
17 ROBUST_CHANNEL_PARAMETER_ERROR CONTACT_SUPPORT process unknown
18 ROBUST_CHANNEL_BUS_MASTER_TIMEOUT_ERROR CONTACT_SUPPORT gpu driver
19 ROBUST_CHANNEL_DISP_MISSED_NOTIFIER CONTACT_SUPPORT gpu driver
20 ROBUST_CHANNEL_MPEG_ERROR_SW_METHOD CONTACT_SUPPORT process driver
21 ROBUST_CHANNEL_ME_ERROR_SW_METHOD CONTACT_SUPPORT process driver
22 ROBUST_CHANNEL_VP_ERROR_SW_METHOD CONTACT_SUPPORT process driver
23 ROBUST_CHANNEL_RC_LOGGING_ENABLED CONTACT_SUPPORT gpu unknown
24 ROBUST_CHANNEL_GR_SEMAPHORE_TIMEOUT CONTACT_SUPPORT process driver
25 ROBUST_CHANNEL_GR_ILLEGAL_NOTIFY RESTART_APP process application
26 ROBUST_CHANNEL_FIFO_ERROR_FBISTATE_TIMEOUT CONTACT_SUPPORT gpu driver
27 ROBUST_CHANNEL_VP_ERROR CONTACT_SUPPORT process driver
28 ROBUST_CHANNEL_VP2_ERROR CONTACT_SUPPORT process driver
29 ROBUST_CHANNEL_BSP_ERROR CONTACT_SUPPORT process driver
30 ROBUST_CHANNEL_BAD_ADDR_ACCESS CONTACT_SUPPORT process driver
31 ROBUST_CHANNEL_FIFO_ERROR_MMU_ERR_FLT RESTART_APP process application
32 ROBUST_CHANNEL_PBDMA_ERROR RESTART_APP process application
33 ROBUST_CHANNEL_SEC_ERROR CONTACT_SUPPORT process driver
34 ROBUST_CHANNEL_MSVLD_ERROR CONTACT_SUPPORT process driver
35 ROBUST_CHANNEL_MSPDEC_ERROR CONTACT_SUPPORT process driver
36 ROBUST_CHANNEL_MSPPP_ERROR CONTACT_SUPPORT process driver
37 ROBUST_CHANNEL_FECS_ERR_UNIMP_FIRMWARE_METHOD IGNORE process driver
38 ROBUST_CHANNEL_FECS_ERR_WATCHDOG_TIMEOUT IGNORE process driver
39 ROBUST_CHANNEL_CE0_ERROR RESTART_APP process application
40 ROBUST_CHANNEL_CE1_ERROR RESTART_APP process application
41 ROBUST_CHANNEL_CE2_ERROR RESTART_APP process application
42 ROBUST_CHANNEL_VIC_ERROR CONTACT_SUPPORT process driver
43 ROBUST_CHANNEL_RESETCHANNEL_VERIF_ERROR IGNORE process application
44 ROBUST_CHANNEL_GR_FAULT_DURING_CTXSW IGNORE process driver
45 ROBUST_CHANNEL_PREEMPTIVE_REMOVAL WORKFLOW_XID_45 process application
46 ROBUST_CHANNEL_GPU_TIMEOUT_ERROR RESET_GPU gpu gpu_reset
47 ROBUST_CHANNEL_NVENC0_ERROR CONTACT_SUPPORT process driver
48 ROBUST_CHANNEL_GPU_ECC_DBE WORKFLOW_XID_48 instance gpu_reset
49 SILENT_RUNNING_CONSTANT_LEVEL_SET_BY_REGISTRY CONTACT_SUPPORT gpu unknown
50 SILENT_RUNNING_LEVEL_TRANSITION_DUE_TO_RC_ERROR CONTACT_SUPPORT gpu unknown
51 SILENT_RUNNING_STRESS_TEST_FAILURE CONTACT_SUPPORT gpu unknown
52 SILENT_RUNNING_LEVEL_TRANS_DUE_TO_TEMP_RISE CONTACT_SUPPORT gpu thermal
53 SILENT_RUNNING_TEMP_REDUCED_CLOCKING CONTACT_SUPPORT gpu thermal
54 SILENT_RUNNING_PWR_REDUCED_CLOCKING CHECK_MECHANICALS gpu hardware
55 SILENT_RUNNING_TEMPERATURE_READ_ERROR CONTACT_SUPPORT gpu thermal
56 DISPLAY_CHANNEL_EXCEPTION CONTACT_SUPPORT gpu hardware
57 FB_LINK_TRAINING_FAILURE_ERROR CONTACT_SUPPORT gpu hardware
58 FB_MEMORY_ERROR CONTACT_SUPPORT gpu hardware
59 PMU_ERROR CONTACT_SUPPORT gpu driver
60 ROBUST_CHANNEL_SEC2_ERROR RESTART_APP process application
61 PMU_BREAKPOINT CONTACT_SUPPORT gpu driver
62 PMU_HALT_ERROR RESET_GPU gpu gpu_reset
63 INFOROM_DRAM_RETIREMENT_EVENT IGNORE gpu informational
64 INFOROM_DRAM_RETIREMENT_FAILURE RESET_GPU gpu gpu_reset
65 ROBUST_CHANNEL_NVENC1_ERROR CONTACT_SUPPORT process hardware
66 ROBUST_CHANNEL_FECS_ERR_REG_ACCESS_VIOLATION IGNORE process driver
67 ROBUST_CHANNEL_FECS_ERR_VERIF_VIOLATION IGNORE process driver
68 ROBUST_CHANNEL_NVDEC0_ERROR RESTART_APP process application
69 ROBUST_CHANNEL_GR_CLASS_ERROR RESTART_APP process application
70 ROBUST_CHANNEL_CE3_ERROR RESTART_APP process application
71 ROBUST_CHANNEL_CE4_ERROR RESTART_APP process application
72 ROBUST_CHANNEL_CE5_ERROR RESTART_APP process application
73 ROBUST_CHANNEL_NVENC2_ERROR CONTACT_SUPPORT process hardware
74 NVLINK_ERROR WORKFLOW_NVLINK_ERR link nvlink
75 ROBUST_CHANNEL_CE6_ERROR RESTART_APP process application
76 ROBUST_CHANNEL_CE7_ERROR RESTART_APP process application
77 ROBUST_CHANNEL_CE8_ERROR RESTART_APP process application
78 VGPU_START_ERROR UPDATE_SWFW gpu driver
79 ROBUST_CHANNEL_GPU_HAS_FALLEN_OFF_THE_BUS RESTART_BM gpu node_reboot
80 PBDMA_PUSHBUFFER_CRC_MISMATCH RESTART_APP process application
81 ROBUST_CHANNEL_VGA_SUBSYSTEM_ERROR CONTACT_SUPPORT gpu hardware
82 ROBUST_CHANNEL_NVJPG0_ERROR RESTART_APP process application
83 ROBUST_CHANNEL_NVDEC1_ERROR RESTART_APP process application
84 ROBUST_CHANNEL_NVDEC2_ERROR RESTART_APP process application
85 ROBUST_CHANNEL_CE9_ERROR RESTART_APP process application
86 ROBUST_CHANNEL_OFA0_ERROR RESTART_APP process application
87 NVTELEMETRY_DRIVER_REPORT CONTACT_SUPPORT gpu unknown
88 ROBUST_CHANNEL_NVDEC3_ERROR RESTART_APP process application
89 ROBUST_CHANNEL_NVDEC4_ERROR RESTART_APP process application
90 LTC_ERROR CONTACT_SUPPORT gpu unknown
91 RESERVED_XID CONTACT_SUPPORT gpu unknown
92 EXCESSIVE_SBE_INTERRUPTS IGNORE gpu informational
93 INFOROM_ERASE_LIMIT_EXCEEDED IGNORE gpu informational
94 ROBUST_CHANNEL_CONTAINED_ERROR RESTART_APP instance contained
95 ROBUST_CHANNEL_UNCONTAINED_ERROR RESET_GPU gpu gpu_reset
96 ROBUST_CHANNEL_NVDEC5_ERROR RESTART_APP process application
97 ROBUST_CHANNEL_NVDEC6_ERROR RESTART_APP process application
98 ROBUST_CHANNEL_NVDEC7_ERROR RESTART_APP process application
99 ROBUST_CHANNEL_NVJPG1_ERROR RESTART_APP process application
100 ROBUST_CHANNEL_NVJPG2_ERROR RESTART_APP process application
101 ROBUST_CHANNEL_NVJPG3_ERROR RESTART_APP process application
102 ROBUST_CHANNEL_NVJPG4_ERROR RESTART_APP process application
103 ROBUST_CHANNEL_NVJPG5_ERROR RESTART_APP process application
104 ROBUST_CHANNEL_NVJPG6_ERROR RESTART_APP process application
105 ROBUST_CHANNEL_NVJPG7_ERROR RESTART_APP process application
106 SMBPBI_TEST_MESSAGE IGNORE gpu informational
107 SMBPBI_TEST_MESSAGE_SILENT IGNORE gpu informational
108 NVLINK_REMOTE_TRANSLATION_ERROR IGNORE process application
109 ROBUST_CHANNEL_CTXSW_TIMEOUT_ERROR RESET_GPU gpu gpu_reset
110 SEC_FAULT_ERROR RESET_GPU gpu gpu_reset
111 BUNDLE_ERROR_EVENT CONTACT_SUPPORT gpu hardware
112 DISP_SUPERVISOR_ERROR CONTACT_SUPPORT gpu hardware
113 DP_LT_FAILURE CONTACT_SUPPORT gpu hardware
114 HEAD_RG_UNDERFLOW CONTACT_SUPPORT gpu hardware
115 CORE_CHANNEL_REGS CONTACT_SUPPORT gpu hardware
116 WINDOW_CHANNEL_REGS CONTACT_SUPPORT gpu hardware
117 CURSOR_CHANNEL_REGS CONTACT_SUPPORT gpu hardware
118 HEAD_REGS CONTACT_SUPPORT gpu hardware
119 GSP_RPC_TIMEOUT RESET_GPU gpu gpu_reset
120 GSP_ERROR RESET_GPU gpu gpu_reset
121 C2C_ERROR IGNORE link informational
122 SPI_PMU_RPC_READ_FAIL CONTACT_SUPPORT gpu hardware
123 SPI_PMU_RPC_WRITE_FAIL CONTACT_SUPPORT gpu hardware
124 SPI_PMU_RPC_ERASE_FAIL CONTACT_SUPPORT gpu hardware
125 INFOROM_FS_ERROR CONTACT_SUPPORT gpu hardware
126 ROBUST_CHANNEL_CE10_ERROR RESTART_APP process application
127 ROBUST_CHANNEL_CE11_ERROR RESTART_APP process application
128 ROBUST_CHANNEL_CE12_ERROR RESTART_APP process application
129 ROBUST_CHANNEL_CE13_ERROR RESTART_APP process application
130 ROBUST_CHANNEL_CE14_ERROR RESTART_APP process application
131 ROBUST_CHANNEL_CE15_ERROR RESTART_APP process application
132 ROBUST_CHANNEL_CE16_ERROR RESTART_APP process application
133 ROBUST_CHANNEL_CE17_ERROR RESTART_APP process application
134 ROBUST_CHANNEL_CE18_ERROR RESTART_APP process application
135 ROBUST_CHANNEL_CE19_ERROR RESTART_APP process application
136 ALI_TRAINING_FAIL RESET_GPU link gpu_reset
137 NVLINK_PRIV_ERR IGNORE process application
138 ROBUST_CHANNEL_DLA_ERROR CONTACT_SUPPORT process unknown
139 ROBUST_CHANNEL_OFA1_ERROR RESTART_APP process application
140 UNRECOVERABLE_ECC_ERROR_ESCAPE RESET_GPU instance gpu_reset
141 ROBUST_CHANNEL_FAST_PATH_ERROR IGNORE process informational
142 ROBUST_CHANNEL_NVENC3_ERROR CONTACT_SUPPORT process hardware
143 GPU_INIT_ERROR RESET_GPU gpu gpu_reset
144 NVLINK_SAW_ERROR WORKFLOW_NVLINK5_ERR link nvlink
145 NVLINK_RLW_ERROR WORKFLOW_NVLINK5_ERR link nvlink
146 NVLINK_TLW_ERROR WORKFLOW_NVLINK5_ERR link nvlink
147 NVLINK_TREX_ERROR WORKFLOW_NVLINK5_ERR link nvlink
148 NVLINK_NVLPW_CTRL_ERROR WORKFLOW_NVLINK5_ERR link nvlink
149 NVLINK_NETIR_ERROR WORKFLOW_NVLINK5_ERR link nvlink
150 NVLINK_MSE_ERROR WORKFLOW_NVLINK5_ERR link nvlink
151 ROBUST_CHANNEL_KEY_ROTATION_ERROR RESTART_VM gpu node_reboot
152 ROBUST_CHANNEL_DLA_SMMU_ERROR IGNORE process informational
153 ROBUST_CHANNEL_DLA_TIMEOUT IGNORE process informational
154 GPU_RECOVERY_ACTION_CHANGED XID_154 gpu informational
155 NVLINK_SW_DEFINED_ERROR RESET_GPU link nvlink
156 RESOURCE_RETIREMENT_EVENT RESET_GPU gpu gpu_reset
157 RESOURCE_RETIREMENT_FAILURE IGNORE gpu informational
158 GPU_FATAL_TIMEOUT RESET_GPU gpu gpu_reset
159 ROBUST_CHANNEL_CHI_NON_DATA_ERROR CHECK_UVM gpu gpu_reset
160 CHANNEL_RETIREMENT_EVENT IGNORE gpu informational
161 CHANNEL_RETIREMENT_FAILURE IGNORE gpu informational
162 PSHC_REENGAGED - gpu informational
163 PSHC_DISENGAGED - gpu thermal
164 PSHC_LOW_LIFETIME - gpu informational
165 PSHC_ZERO_LIFETIME - gpu informational
166 NVLINK_SECURE_CRYPTO_ERR - link nvlink
167 PCIE_FATAL_TIMEOUT - gpu hardware
168 REDUCED_GPU_MEMORY_CAPACITY - gpu hardware
169 SEC2_HALT_ERROR - gpu gpu_reset
170 NVLINK_SECURE_OTHER - link nvlink
171 UNCORRECTABLE_DRAM_ERROR - gpu gpu_reset
172 UNCORRECTABLE_SRAM_ERROR - gpu gpu_reset
173 C2C_FATAL_LINK_FAILURE - link hardware
174 ROBUST_CHANNEL_RESETCHANNEL_KILL_PROCESS_SILENT - process application
175 MEMORY_SUBSYSTEM_ERROR - gpu gpu_reset
176 PCIE_CORRECTABLE_ERROR_FAULT - gpu unknown
999 - - gpu unknown
"""

TABLE = {
    int(code): Xid(int(code), *(word.strip("-") for word in words))
    for code, *words in map(str.split, _ROWS.strip().splitlines())
}
