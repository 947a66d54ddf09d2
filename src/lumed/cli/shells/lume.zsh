#compdef lume
# Completion of lume for zsh. In ~/.zshrc, behind compinit: source <(lume completion zsh)
#
# All words up to the cursor go to `lume __complete`, which answers with a line for each
# candidate (see cyclopts, App._run_complete). What it says is data: nothing is evaluated.
_lume() {
    local program=${${(Q)words[1]}/#\~\//$HOME/} line value text prefix= begun= files=
    local -a asked values shown open
    asked=("${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}")
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
            value=${line%%$'\t'*}
            text=${${line#"$value"}#$'\t'}
            if [[ $value == *: ]]; then
                open+=("$prefix$value")
            else
                values+=("$prefix$value")
                shown+=("$value${text:+  -- $text}")
            fi
        fi
    done < <(CYCLOPTS_COMPLETION_WORDS=${(pj:\x1f:)asked}$'\x1f' \
        "$program" __complete </dev/null 2>/dev/null)

    local result=1
    (( $#open )) && compadd -S '' -a open && result=0
    (( $#values )) && compadd -l -d shown -a values && result=0
    # What begins like a path is one.
    if [[ -n $files || ${PREFIX#"$prefix"} == [./~]* ]]; then
        [[ -z $prefix ]] || compset -P '*='
        _files && result=0
    fi
    return result
}
if [[ $funcstack[1] == _lume ]]; then
    _lume "$@"
else
    compdef _lume lume
fi
