// Vault as its module has it: the module's own main package can't be installed by name, for its go.mod replaces modules.
package main

import (
	"os"

	"github.com/hashicorp/vault/command"
)

func main() { os.Exit(command.Run(os.Args[1:])) }
