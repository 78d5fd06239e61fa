# shellcheck shell=bash
# Read .env into the environment: its only reader. Runs: host, sourced.
#   source scripts/host/read_env.sh; read_settings
# The grammar is narrow, because all other readers of such files disagree: see the top of .env.example.

checkout=$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

fail() {
    printf 'bridge: %s\n' "$@" >&2
    exit 2
}

# The names in .env.example; one with a * stands for a family. What is no name there goes into no container.
mapfile -t known < <(sed -nE 's/^#?([A-Za-z_][A-Za-z0-9_]*\*?)=.*/\1/p' "$checkout/.env.example")

is_known() {
    local pattern
    # The tutorial's names, which nothing reads.
    [[ $1 != WANDB_PROJECT_NAME && $1 != WANDB_RUN_NAME ]] || return 1
    for pattern in "${known[@]}"; do
        # shellcheck disable=SC2053 # a family is a pattern
        [[ $1 != $pattern ]] || return 0
    done
    return 1
}

unknown() { # NAME: say that it is none, and which one may have been meant
    local name other meant='' given=${1//_/}
    for name in "${known[@]}"; do
        other=${name//_/}
        [[ ${other,,} != "${given,,}"* && ${given,,} != "${other,,}"* ]] || meant=" Did you mean $name?"
    done
    [[ $1 != WANDB_RUN_NAME ]] || meant=" Did you mean RUN?"
    echo "$1 is not a setting.$meant .env.example explains every one."
}

# Sets each name of .env that the environment does not have (one that is set and empty counts as set). Names all
# mistakes at once, in .env and on make's command line, and ends the script with 2. Prints no value: some are secrets.
read_settings() { # [PATTERN]: of .env, only names that match it
    # Bytes, not characters: a path may be in any encoding.
    local LC_ALL=C file=${ENV_FILE:-$checkout/.env} line number=0 where name value quote singles doubles
    local -a problems=()
    local -A found=()

    for name in ${MAKE_NAMES:-}; do
        [[ $name == ARGS || $name == ENV_FILE ]] || is_known "$name" || problems+=("make: $(unknown "$name")")
        [[ ${name^^} != *@(TOKEN|KEY|PASSWORD) ]] || problems+=("make: $name is a secret, which ps shows to all. Put it into .env.")
    done
    if [[ -n ${ENV_FILE:-} || -e $file ]] && [[ ! -f $file || ! -r $file ]]; then
        problems+=("$file (ENV_FILE, else .env) is not a file that can be read.")
    fi
    [[ -f $file && -r $file ]] || file=/dev/null
    # Bash drops NUL bytes in silence; where there is one, a read up to it succeeds.
    ! IFS= read -r -d '' line < "$file" || { line=${line//[^$'\n']/} &&
        problems+=("$file line $((${#line} + 1)) holds a NUL byte. Save the file as UTF-8 text."); }
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1)) where="$file line $number"
        # A byte order mark, and the other half of Windows' line ends. With a control character, a comment is no comment.
        [[ $number != 1 ]] || line=${line#$'\xef\xbb\xbf'}
        line=${line%$'\r'}
        [[ ${line//$'\t'/} != *[[:cntrl:]]* ]] || line='?'
        [[ ! $line =~ ^[[:space:]]*(#|$) ]] || continue
        [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || {
            problems+=("$where is not NAME=value (no space before the =, no control character; Unix line ends).") && continue; }
        name=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
        value=${value#"${value%%[![:space:]]*}"}
        value=${value%"${value##*[![:space:]]}"}
        quote=${value:0:1} singles=${value//[^\']/} doubles=${value//[^\"]/}
        if [[ $quote != [\"\'] ]]; then
            [[ $value != *[[:space:]]#* ]] ||
                echo "bridge: $where: all of the line is $name's value, the # too. A comment needs its own line." >&2
            quote=''
        fi
        if ! is_known "$name"; then
            problems+=("$where: $(unknown "$name")")
        elif [[ $value == *[\$\`]* ]]; then
            problems+=("$where: $name has a \$ or a backquote. Nothing is expanded here: write the value itself.")
        elif [[ $quote == '' && $((${#singles} % 2 + ${#doubles} % 2)) != 0 ]] ||
            [[ -n $quote && ! $value =~ ^($quote)[^$quote]*($quote)$ ]]; then
            problems+=("$where: $name has unbalanced quotes. One pair may stand around the whole value.")
        elif [[ $value =~ YOU_[A-Z_]+ ]]; then
            problems+=("$where: $name still holds the tutorial's placeholder YOU_.... Put your own value there.")
        else
            [[ -z $quote ]] || value=${value:1:${#value}-2}
            # shellcheck disable=SC2088 # the tilde as written in the file
            [[ $value != "~" && $value != "~/"* ]] || value=${HOME:-~}${value#\~}
            [[ ${found[$name]-$value} == "$value" ]] ||
                problems+=("$where gives $name another value than a line before. Keep one.")
            found[$name]=$value
        fi
    done < "$file"
    [[ ${#problems[@]} == 0 ]] || fail "${problems[@]}"
    [[ -z ${found[HF_TOKEN]:-}${found[WANDB_API_KEY]:-} || $((0$(stat -Lc %a -- "$file") & 044)) == 0 ]] ||
        echo "bridge: warning: $file holds a token and others can read it. Keep it to yourself: chmod 600 $file" >&2
    # Before bash 4.4 an empty array counts as unset.
    for name in ${found[@]+"${!found[@]}"}; do
        [[ -v $name || ! $name =~ ^(${1:-.*})$ ]] || export "$name=${found[$name]}"
    done
}
