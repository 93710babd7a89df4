{{- define "vattn-sgl.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "vattn-sgl.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- $name := include "vattn-sgl.name" . }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "vattn-sgl.selectorLabels" -}}
app.kubernetes.io/name: {{ include "vattn-sgl.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "vattn-sgl.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "vattn-sgl.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "vattn-sgl.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "vattn-sgl.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Name of the Secret with the admin key; empty where there is none. */}}
{{- define "vattn-sgl.adminSecret" -}}
{{- if .Values.admin.existingSecret }}
{{- .Values.admin.existingSecret }}
{{- else if .Values.admin.key }}
{{- printf "%s-admin" (include "vattn-sgl.fullname" . | trunc 57 | trimSuffix "-") }}
{{- end }}
{{- end }}

{{- define "vattn-sgl.cacheClaim" -}}
{{- default (printf "%s-cache" (include "vattn-sgl.fullname" . | trunc 57 | trimSuffix "-")) .Values.cache.persistence.existingClaim }}
{{- end }}

{{- define "vattn-sgl.probe" -}}
httpGet:
  path: {{ .path }}
  port: http
{{- with omit . "path" }}
{{ toYaml . }}
{{- end }}
{{- end }}
