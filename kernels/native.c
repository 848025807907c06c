/* A team of threads. */
typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel of torch's OpenMP runtime */
    int (*thread)(void);                                            /* omp_get_thread_num */
    int (*threads)(void);                                           /* omp_get_num_threads */
} Runtime;

typedef struct {
    const Runtime *runtime;
    void (*function)(void *arguments, int thread, int threads);
    void *arguments;
} Call;

static void run_one(void *pointer) {
    const Call *call = pointer;
    call->function(call->arguments, call->runtime->thread(), call->runtime->threads());
}

/* Run `function` once on each thread of a team; the runtime may give fewer than asked for. */
void braid_parallel(const Runtime *runtime, void (*function)(void *, int, int), void *arguments, int threads) {
    if (threads == 1) {
        function(arguments, 0, 1);
        return;
    }
    Call call = {runtime, function, arguments};
    runtime->parallel(run_one, &call, (unsigned)threads, 0);
}
