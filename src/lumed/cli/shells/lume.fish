# Completion of lume for fish: lume completion fish > ~/.config/fish/completions/lume.fish
#
# All words up to the cursor go to `lume __complete`, which answers with a line for each
# candidate (see cyclopts, App._run_complete). What it says is data: nothing is evaluated.
function __lume_complete
    set -l words (commandline -opc)
    set -l current "$(commandline -ct)"
    set -l program (string replace -r '^~/' "$HOME/" -- $words[1])
    set -l asked (string join \x1f -- $words[2..] "$current")\x1f
    set -l begun no
    set -l files no
    set -l prefix ''
    CYCLOPTS_COMPLETION_WORDS="$asked" command $program __complete </dev/null 2>/dev/null | while read -l line
        if test "$line" = \x1fbegin
            set begun yes
        else if test $begun = no -o -z "$line"
            continue
        else if string match -q -- \x1fprefix\t'*' "$line"
            set prefix (string replace -- \x1fprefix\t '' "$line")
        else if test "$line" = \x1ffiles
            set files yes
        else if not string match -q -- \x1f'*' "$line"
            printf '%s%s\n' "$prefix" "$line"
        end
    end
    # What begins like a path is one.
    set -l tail (string replace -- "$prefix" '' "$current")
    if test $files = yes; or string match -qr '^[./~]' -- "$tail"
        for path in (__fish_complete_path "$tail")
            printf '%s%s\n' "$prefix" "$path"
        end
    end
end
complete -c lume -f -a '(__lume_complete)'
