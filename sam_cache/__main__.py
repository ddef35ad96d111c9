from sam_cache.cli import main

if __name__ == "__main__":
    main()
