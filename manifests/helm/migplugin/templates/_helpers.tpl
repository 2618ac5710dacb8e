{{- define "migplugin.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "migplugin.fullname" -}}
{{- $name := include "migplugin.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "migplugin.namespace" -}}
{{- .Values.namespaceOverride | default .Release.Namespace }}
{{- end }}

{{- define "migplugin.selectorLabels" -}}
{{- if .Values.selectorLabelsOverride }}
{{- toYaml .Values.selectorLabelsOverride }}
{{- else -}}
app.kubernetes.io/name: {{ include "migplugin.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
{{- end }}

{{- define "migplugin.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "migplugin.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: migplugin
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "migplugin.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ printf "%s@%s" .repository .digest }}
{{- else }}{{ printf "%s:%s" .repository (.tag | default $.Chart.AppVersion) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "migplugin.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "migplugin.fullname" .) }}
{{- end }}

{{/* "true" or "": whether the container is privileged. */}}
{{- define "migplugin.privileged" -}}
{{- if or .Values.privileged .Values.compatWithCPUManager }}true{{ end }}
{{- end }}

{{/* "true" or "": whether some cdi- strategy may be on. */}}
{{- define "migplugin.cdi" -}}
{{- $texts := list (.Values.deviceListStrategy | default "" | toString) }}
{{- range .Values.config.map }}{{- $texts = append $texts (toString .) }}{{- end }}
{{- if kindIs "bool" .Values.cdi.mount }}{{ if .Values.cdi.mount }}true{{ end }}
{{- else if contains "cdi-" (join " " $texts) }}true{{ end }}
{{- end }}

{{/* Where the driver is on the host, if we are to see it. */}}
{{- define "migplugin.driverRoot" -}}
{{- if .Values.nvidiaDriverRoot }}{{ .Values.nvidiaDriverRoot }}
{{- else if .Values.gpuOperator.enabled }}/run/nvidia/driver
{{- else if or (include "migplugin.privileged" .) (include "migplugin.cdi" .) }}/
{{- end }}
{{- end }}

{{- define "migplugin.configMap" -}}
{{- .Values.config.name | default (printf "%s-config" (include "migplugin.fullname" .)) }}
{{- end }}

{{/* Which file of the ConfigMap is used. templates/validation.yaml makes sure that there is one. */}}
{{- define "migplugin.configFile" -}}
{{- $config := .Values.config }}
{{- if $config.default }}{{ $config.default }}
{{- else if $config.map }}
{{- if and (has "named" $config.fallbackStrategies) (hasKey $config.map "default") }}default
{{- else if and (has "single" $config.fallbackStrategies) (eq (len $config.map) 1) }}{{ keys $config.map | first }}
{{- end }}
{{- else if not $config.name }}config.yaml
{{- end }}
{{- end }}

{{- define "migplugin.seLinuxOptions" -}}
{{- if .Values.seLinuxOptions }}{{ toYaml .Values.seLinuxOptions }}
{{- else if and .Values.openshift.enabled (not (include "migplugin.privileged" .)) }}type: container_device_plugin_t
{{- end }}
{{- end }}

{{/* Of the pod, for init containers look at the host's directories too. */}}
{{- define "migplugin.podSecurityContext" -}}
{{- with .Values.podSecurityContext }}{{ toYaml . }}
{{ end }}
{{- with include "migplugin.seLinuxOptions" . }}
{{- printf "seLinuxOptions:\n%s" (. | indent 2) }}
{{- end }}
{{- end }}

{{/* Whether the NVIDIA runtime would start a container that asks to monitor MIG: one with the privilege for it. */}}
{{- define "migplugin.monitors" -}}
{{- $given := .Values.securityContext }}
{{- if or (not $given) (dig "privileged" false $given) (has "SYS_ADMIN" (dig "capabilities" "add" list $given)) }}true{{ end }}
{{- end }}

{{- define "migplugin.securityContext" -}}
{{- if .Values.securityContext }}
{{- toYaml .Values.securityContext }}
{{- else -}}
runAsUser: 0
runAsGroup: 0
readOnlyRootFilesystem: true
{{- if include "migplugin.privileged" . }}
privileged: true
{{- else }}
allowPrivilegeEscalation: false
capabilities:
  drop: ["ALL"]
  add: ["SYS_ADMIN"{{ if .Values.simulated.enabled }}, "MKNOD"{{ end }}]
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- end }}
{{- end }}

{{/* A variable for each setting that has a value. */}}
{{- define "migplugin.settings" -}}
{{- $v := .Values }}
{{- $pass := $v.passDeviceSpecs }}
{{- if and (kindIs "invalid" $pass) (include "migplugin.privileged" .) }}{{ $pass = true }}{{ end }}
{{- $list := $v.deviceListStrategy }}
{{- if kindIs "slice" $list }}{{ $list = join "," $list }}{{ end }}
{{- $driverRoot := $v.nvidiaDriverRoot }}
{{- if and (not $driverRoot) $v.gpuOperator.enabled }}{{ $driverRoot = "/run/nvidia/driver" }}{{ end }}
{{- $hook := $v.cdi.nvidiaHookPath }}
{{- if and (not $hook) $v.gpuOperator.enabled }}{{ $hook = "/usr/local/nvidia/toolkit/nvidia-cdi-hook" }}{{ end }}
{{- range list
  (list "MIG_STRATEGY" $v.migStrategy)
  (list "FAIL_ON_INIT_ERROR" $v.failOnInitError)
  (list "PASS_DEVICE_SPECS" $pass)
  (list "DEVICE_LIST_STRATEGY" $list)
  (list "DEVICE_ID_STRATEGY" $v.deviceIDStrategy)
  (list "DEVICE_DISCOVERY_STRATEGY" $v.deviceDiscoveryStrategy)
  (list "SHARED_DEVICES_ALLOCATION_POLICY" $v.sharedDevicesAllocationPolicy)
  (list "NVIDIA_DRIVER_ROOT" $driverRoot)
  (list "NVIDIA_DEV_ROOT" $v.nvidiaDevRoot)
  (list "NVIDIA_CDI_HOOK_PATH" $hook)
  (list "CDI_FEATURE_FLAGS" $v.cdi.featureFlags)
  (list "GDRCOPY_ENABLED" $v.gdrcopyEnabled)
  (list "GDS_ENABLED" $v.gdsEnabled)
  (list "MOFED_ENABLED" $v.mofedEnabled)
  (list "MIGPLUGIN_RESOURCE_DOMAIN" $v.resourceDomain)
  (list "MIGPLUGIN_POLL_INTERVAL" $v.pollInterval)
  (list "MIGPLUGIN_REMOVAL_DELAY" $v.removalDelay)
  (list "MIGPLUGIN_LOG_FORMAT" $v.logFormat)
  (list "MIGPLUGIN_LOG_LEVEL" $v.logLevel)
}}
{{- if not (kindIs "invalid" (index . 1)) }}
- name: {{ index . 0 }}
  value: {{ index . 1 | toString | quote }}
{{- end }}
{{- end }}
{{- end }}
