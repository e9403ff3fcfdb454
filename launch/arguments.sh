# shellcheck shell=bash
# Reads the options of a launcher. Sourced.
#
# The launcher declares `option`, name → default; `parse "$@"` fills it. What follows --
# goes to main as it is and lies in `passed`.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "${0##*/}: needs bash 4.4 or later; this is $BASH_VERSION" >&2
  exit 2
fi

shopt -s inherit_errexit # what is refused inside $(...) ends the launcher too
declare -A option=()
passed=()

say() { echo "${0##*/}: $*" >&2; }

# Ends the launcher: what was asked for cannot be done.
refuse() {
  say "refused: $*"
  exit 2
}

parse() {
  local name
  while (($#)); do
    case $1 in
      --help | -h)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0" # the comment at its head
        exit 0
        ;;
      --dry-run) option[dry-run]=1 ;;
      --)
        shift
        passed=("$@")
        break
        ;;
      *)
        [[ $1 =~ ^--([a-z-]+)= ]] || refuse "unexpected argument '$1';" \
          "options are --NAME=VALUE, what main is to get follows --"
        name=${BASH_REMATCH[1]}
        [[ -v option[$name] ]] || refuse "unknown option --$name;" \
          "known: $(printf '%s\n' "${!option[@]}" | sort | tr '\n' ' ')"
        option[$name]=${1#*=}
        ;;
    esac
    shift
  done
}

need() {
  local name
  for name in "$@"; do
    [[ -n ${option[$name]} ]] || refuse "--$name is missing; --help says what it is"
  done
}

# Refuses an option, where it is given, that does not match a regular expression whole.
match() {
  local name=$1 pattern=$2 wanted=$3
  [[ -z ${option[$name]} || ${option[$name]} =~ ^($pattern)$ ]] ||
    refuse "--$name=${option[$name]} must be $wanted"
}

count() {
  local name
  for name in "$@"; do
    match "$name" '[1-9][0-9]{0,5}' "a whole number of 1 or more"
  done
}

config_file() {
  [[ -f ${1%%:*} ]] || refuse "no config file '${1%%:*}'"
}

program() {
  command -v "$1" >/dev/null || refuse "$1 is not to be found"
}

# Refuses flags of main after -- that the launcher sets itself.
reserved() {
  local argument name
  for argument in "${passed[@]}"; do
    [[ $argument =~ ^--?([^=]*) ]] || continue
    for name in "$@"; do
      [[ ${BASH_REMATCH[1]} != "$name" ]] ||
        refuse "$argument follows --, but --$name is set by the launcher"
    done
  done
}

# Fills `mesh` with the flag that takes all devices, unless the user has one of his own.
whole_mesh() {
  local argument
  # shellcheck disable=SC2034 # the launchers read it
  mesh=(--config.mesh.data=0)
  for argument in "${passed[@]}"; do
    # shellcheck disable=SC2034
    [[ $argument != --config.mesh.* ]] || mesh=()
  done
}

# The words as one line that bash reads as the same words.
quoted() {
  local word line=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# Runs the command, or prints it in a dry run.
run() {
  if [[ -n ${option[dry-run]-} ]]; then
    quoted "$@"
  else
    "$@"
  fi
}
