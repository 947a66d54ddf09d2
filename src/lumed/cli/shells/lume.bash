# Completion of lume for bash. In ~/.bashrc: source <(lume completion bash)
#
# All words up to the cursor go to `lume __complete`, which answers with a line for each
# candidate (see cyclopts, App._run_complete). What it says is data: nothing is evaluated.
_lume() {
    local program=${COMP_WORDS[0]/#\~/$HOME} rest=${COMP_LINE:0:COMP_POINT}
    local blanks word line value current head tail prefix='' begun='' files=''
    local -a words=()
    local -i i
    # Readline ends words at : and = too, which belong to ours.
    rest=${rest#"${rest%%[![:blank:]]*}"}
    rest=${rest#"${COMP_WORDS[0]}"}
    for ((i = 1; i <= COMP_CWORD; i++)); do
        blanks=${rest%%[![:blank:]]*}
        rest=${rest#"$blanks"}
        word=${COMP_WORDS[i]}
        # Up to the cursor only.
        ((i < COMP_CWORD)) || word=$rest
        if [[ -n $blanks || ${#words[@]} -eq 0 ]]; then
            words+=("$word")
        else
            words[-1]+=$word
        fi
        rest=${rest#"$word"}
    done
    current=${words[-1]}
    # What readline leaves as it is: all up to the last : or = at which it splits.
    word=${COMP_WORDBREAKS//[^:=]/}
    head=
    [[ -z $word ]] || head=${current%"${current##*["$word"]}"}

    COMPREPLY=()
    local -a found=()
    while IFS= read -r line; do
        if [[ $line == $'\x1f'begin ]]; then
            begun=yes
        elif [[ -z $begun || -z $line ]]; then
            continue
        elif [[ $line == $'\x1f'prefix$'\t'* ]]; then
            prefix=${line#*$'\t'}
        elif [[ $line == $'\x1f'files ]]; then
            files=yes
        elif [[ $line != $'\x1f'* ]]; then
            found+=("${line%%$'\t'*}")
        fi
    done < <(CYCLOPTS_COMPLETION_WORDS=$(printf '%s\x1f' "${words[@]}") \
        "$program" __complete </dev/null 2>/dev/null)

    tail=${current#"$prefix"}
    # What begins like a path is one.
    [[ $tail != [./~]* ]] || files=yes
    for value in "${found[@]}"; do
        if [[ $value == "$tail"* ]]; then
            value=$prefix$value
            value=${value#"$head"}
            # With files, readline itself does the quoting.
            [[ -n $files ]] || printf -v value %q "$value"
            COMPREPLY+=("$value")
        fi
    done
    if [[ -n $files ]]; then
        compopt -o filenames 2>/dev/null
        while IFS= read -r line; do
            line=$prefix$line
            COMPREPLY+=("${line#"$head"}")
        done < <(compgen -f -- "$tail")
    fi
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *: ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
complete -F _lume lume
