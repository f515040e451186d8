from raymill.cli import main

main()
